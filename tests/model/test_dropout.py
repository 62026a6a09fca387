"""Dropout: its masks are those of the documented rule under every cut, with shares and scales as asked."""

from typing import Any

import pytest
import torch
from cut_stages import GPT2, LLAMA, NEOX, assert_gradients_agree, cut_stages, loss_of, model_config, whole_weights
from harness import run_distributed
from reference_model import PlainDropout, ReferenceModel
from torch import Tensor

from megalite.config import Recompute
from megalite.model.dropout import DropoutStreams
from megalite.model.microbatch import Microbatch
from megalite.model.packing import PackedDocuments
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup

LONG = {"max_position_embeddings": 80}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2 | LONG,
    "llama, 2 kv heads, tied": LLAMA | LONG | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": NEOX | LONG,
}
SEED, SAMPLES = 21, (4, 1_000_003)
# Rows longer than a block of 64, and a document over the end of one.
DOCUMENTS = ((5, 62, 3), (70,))


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, LLAMA["vocab_size"], (2, 71), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def run(stages: list[Stage], packing: PackedDocuments | None, dropout: DropoutStreams | None) -> Tensor:
    return loss_of(stages, Microbatch(*batch(), packing, dropout=dropout))


def compare(fields: dict[str, Any], num_stages: int, packed: bool, recompute: Recompute | None) -> None:
    config = model_config(fields)
    weights = whole_weights(config)
    reference = ReferenceModel(config, weights, PlainDropout(SEED, SAMPLES, 0.25, 0.125))
    documents = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in DOCUMENTS]) if packed else None
    expected = reference(*batch(), documents=documents)
    expected.backward()

    stages = cut_stages(config, weights, num_stages, recompute=recompute)
    packing = PackedDocuments(DOCUMENTS, None) if packed else None
    loss = run(stages, packing, DropoutStreams(SEED, SAMPLES, 0.25, 0.125))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert_gradients_agree(stages, reference)


@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "documents"])
@pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize(("world_size", "num_stages"), [(1, 1), (2, 2)])
def test_loss_and_gradients_agree_with_the_plain_model(
    fields: dict[str, Any], world_size: int, num_stages: int, packed: bool
) -> None:
    run_distributed(compare, world_size, fields, num_stages, packed, None)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_recomputed_drops_the_same(mode: Any) -> None:
    run_distributed(compare, 2, FAMILIES["gpt2"], 2, True, Recompute(mode, partition=mode == "full"))


def test_shares_of_the_tokens_drop_what_the_whole_does() -> None:
    x = torch.ones(3, 100, 8)
    whole = DropoutStreams(1, (5, 6, 9), hidden_dropout=0.5)
    expected = whole.for_layer("layers.2").hidden(x, "mlp").view(1, 300, 8)
    for size in (2, 3, 4, 10):
        for rank in range(size):
            mine = DropoutStreams(1, (5, 6, 9), hidden_dropout=0.5, token_share=(rank, size)).for_layer("layers.2")
            share = x.view(1, 300, 8).chunk(size, dim=1)[rank]
            assert torch.equal(mine.hidden(share, "mlp"), expected.chunk(size, dim=1)[rank])


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_as_many_are_dropped_as_asked_and_the_mean_stays(share: float) -> None:
    streams = DropoutStreams(3, tuple(range(8)), hidden_dropout=share, attention_dropout=share)
    dropped = streams.hidden(torch.ones(8, 256, 256), "embedding")
    scores = streams.scores(range(4))
    assert scores is not None
    keep_mask = scores.keep_mask([(row, 0) for row in range(8)], 128, torch.device("cpu"))
    assert keep_mask.shape == (32, 128, 128)
    # Five deviations of a mean over half a million draws and more.
    within = 5 * (share * (1 - share) / 2**19) ** 0.5
    assert abs(float((dropped == 0).double().mean()) - share) < within
    assert abs(float(keep_mask.double().mean()) - (1 - share)) < within
    torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / (1 - share)]))
    torch.testing.assert_close(scores.scale, 1 / (1 - share))


def test_no_two_places_drop_alike() -> None:
    def mask(seed: int = 1, sample: int = 2, layer: str = "layers.0", site: str = "mlp") -> Tensor:
        streams = DropoutStreams(seed, (sample,), hidden_dropout=0.5).for_layer(layer)
        return streams.hidden(torch.ones(1, 128, 16), site) != 0

    masks = [mask(), mask(seed=2), mask(sample=3), mask(layer="layers.1"), mask(site="attention")]
    masks += [mask().roll(64, dims=1)]
    for index, one in enumerate(masks):
        for other in masks[:index]:
            assert 0.4 < float((one == other).double().mean()) < 0.6


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    streams, x = DropoutStreams(1, (0,)), torch.ones(1, 4, 8)
    assert streams.hidden(x, "mlp") is x
    assert streams.scores(range(2)) is None


def test_the_state_of_no_generator_matters() -> None:
    config = model_config(GPT2)
    stage = Stage(config, range(3), index=0, num_stages=1, group=TensorGroup())
    stage.initialise(seed=1)
    ids, targets = torch.zeros(1, 20, dtype=torch.int64), torch.ones(1, 20, dtype=torch.int64)
    losses = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        dropped = Microbatch(ids, targets, dropout=DropoutStreams(1, (0,), 0.5, 0.5))
        losses.append(float(loss_of([stage], dropped).detach()))
        assert torch.equal(before, torch.get_rng_state())
    assert losses[0] == losses[1] != float(loss_of([stage], Microbatch(ids, targets)).detach())
