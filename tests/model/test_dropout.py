"""Dropout: its masks are those of the documented rule under every cut, with shares and scales as asked."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from cut_stages import (
    GPT2,
    LLAMA,
    NEOX,
    assert_gradients_agree,
    cu_seqlens,
    cut_stages,
    dropout_streams,
    loss_of,
    model_config,
    whole_weights,
)
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
    packing = PackedDocuments(cu_seqlens(DOCUMENTS), None) if packed else None
    loss = run(stages, packing, dropout_streams(fields, SEED, SAMPLES, 70, 0.25, 0.125))
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
    whole = dropout_streams(LLAMA, 1, (5, 6, 9), 100, 0.5, 0.0).for_layer(2)
    expected = whole.hidden(x, "mlp").view(1, 300, 8)
    for size in (2, 3, 4, 10):
        for rank in range(size):
            share = x.view(1, 300, 8).chunk(size, dim=1)[rank]
            mine = replace(whole, token_share=(rank, size))
            assert torch.equal(mine.hidden(share, "mlp"), expected.chunk(size, dim=1)[rank])


def test_rows_and_documents_drop_what_they_drop_beside_others() -> None:
    """As in another micro-batch, and as in a document that attention sees alone."""
    samples, probabilities = (5, 6, 9), torch.ones(3 * 4, 100, 100)
    together = dropout_streams(LLAMA, 1, samples, 100, 0.5, 0.5).for_layer(2)
    scores = together.scores(range(4))
    assert scores is not None
    hidden, expected = together.hidden(torch.ones(3, 100, 8), "mlp"), scores.apply(probabilities, 0)
    for row, sample in enumerate(samples):
        alone = dropout_streams(LLAMA, 1, (sample,), 100, 0.5, 0.5).for_layer(2)
        assert torch.equal(alone.hidden(torch.ones(1, 100, 8), "mlp")[0], hidden[row])
        heads = alone.scores(range(1, 3))
        assert heads is not None
        assert torch.equal(heads.apply(probabilities[:2], 0), expected.view(3, 4, 100, 100)[row, 1:3])
        document = scores.span(row, 17, 30).apply(probabilities[:4, :30, :30], 0)
        assert torch.equal(document, expected.view(3, 4, 100, 100)[row, :, 17:47, 17:47])
    strip = scores.apply(probabilities[:, 40:60, :60], 40)
    assert torch.equal(strip, expected[:, 40:60, :60])


def masks(share: float) -> dict[str, Tensor]:
    """Masks as 0 and 1, over several samples, layers and sites, ``[..., tokens, features]``."""
    streams = dropout_streams(LLAMA, 3, range(1_000_000, 1_000_008), 256, share, share)
    ones = torch.ones(8, 256, 256)
    found = {"embedding": streams.for_layer(None).hidden(ones, "embedding")}
    for layer in range(2):
        here = streams.for_layer(layer)
        found |= {f"{layer}.{site}": here.hidden(ones, site) for site in ("attention", "mlp")}
        scores = here.scores(range(2))
        assert scores is not None
        found |= {f"{layer}.scores.{head}": scores.apply(ones.repeat(2, 1, 1), 0)[head::2] for head in range(2)}
    return {name: (mask != 0).double() for name, mask in found.items()}


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_as_many_are_dropped_as_asked_and_the_mean_stays(share: float) -> None:
    streams = dropout_streams(LLAMA, 3, range(8), 256, share, share).for_layer(0)
    dropped, scores = streams.hidden(torch.ones(8, 256, 256), "mlp"), streams.scores(range(2))
    assert scores is not None
    for found in (dropped, scores.apply(torch.ones(16, 256, 256), 0)):
        torch.testing.assert_close(found[found != 0].unique(), torch.tensor([1 / (1 - share)]))
    for name, mask in masks(share).items():
        # Five deviations of a mean over half a million draws; of each row and each column as well.
        deviation = (share * (1 - share)) ** 0.5
        assert abs(float(mask.mean()) - (1 - share)) < 5 * deviation / mask.numel() ** 0.5, name
        for dims in ((0, 1), (0, 2), (1, 2)):
            means = mask.mean(dims)
            assert (means - (1 - share)).abs().max() < 6 * deviation / (mask.numel() / means.numel()) ** 0.5, name


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_no_two_places_drop_alike(share: float) -> None:
    """Neighbours along every dim and masks of different sites are not correlated."""
    found = {name: (mask - (1 - share)) / (share * (1 - share)) ** 0.5 for name, mask in masks(share).items()}
    within = 5 / (8 * 256 * 256) ** 0.5
    for name, mask in found.items():
        for dim in range(3):
            for distance in (1, 2, 3, 4, 16, 64, 128) if dim else (1, 2, 3):
                assert abs(float((mask * mask.roll(distance, dim)).mean())) < within, (name, dim, distance)
    for (one, first), (other, second) in combinations(found.items(), 2):
        assert abs(float((first * second).mean())) < within, (one, other)
    other_seed = (
        dropout_streams(LLAMA, 4, range(8), 256, share, 0.0).for_layer(0).hidden(torch.ones(8, 256, 256), "mlp")
    )
    assert abs(float((found["0.mlp"] * (other_seed != 0)).mean())) < within


def test_masks_of_long_runs_need_all_of_a_samples_number() -> None:
    ones = torch.ones(1, 8, 64)
    one, other = (
        dropout_streams(LLAMA, 1, (sample,), 8, 0.5, 0.0).for_layer(0).hidden(ones, "mlp") for sample in (7, 7 + 2**32)
    )
    assert not torch.equal(one, other)


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    x = torch.ones(1, 4, 8)
    assert DropoutStreams.of(model_config(LLAMA), 1, (0,), 4, x.device) is None
    assert dropout_streams(LLAMA, 1, (0,), 4, 0.0, 0.5).for_layer(0).hidden(x, "mlp") is x
    assert dropout_streams(LLAMA, 1, (0,), 4, 0.5, 0.0).for_layer(0).scores(range(2)) is None


def test_the_state_of_no_generator_matters() -> None:
    config = model_config(GPT2)
    stage = Stage(config, range(3), index=0, num_stages=1, group=TensorGroup())
    stage.initialise(seed=1)
    ids, targets = torch.zeros(1, 20, dtype=torch.int64), torch.ones(1, 20, dtype=torch.int64)
    losses = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        dropped = Microbatch(ids, targets, dropout=dropout_streams(GPT2, 1, (0,), 20, 0.5, 0.5))
        losses.append(float(loss_of([stage], dropped).detach()))
        assert torch.equal(before, torch.get_rng_state())
    assert losses[0] == losses[1] != float(loss_of([stage], Microbatch(ids, targets)).detach())
