"""Recomputed activations: the same loss and gradients to the bit, and fewer bytes kept."""

import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from cut_stages import GPT2, LLAMA, NEOX, cu_seqlens, dropout_streams, loss_of, model_config
from harness import run_distributed
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalite.config import Recompute
from megalite.model.dropout import DropoutStreams
from megalite.model.microbatch import Microbatch
from megalite.model.packing import PackedDocuments
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup

MODES = {
    "selective": Recompute("selective"),
    "full": Recompute("full"),
    "one in two": Recompute("full", every=2),
    "two at once": Recompute("full", segment=2),
    "divided": Recompute("full", partition=True),
    "on the host": Recompute("full", cpu=True),
    "divided, on the host, three at once": Recompute("full", segment=3, partition=True, cpu=True),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama, tied": LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt_neox": NEOX,
}
DROPOUT = dropout_streams(LLAMA, 1, (7, 9), 20, 0.25, 0.125)


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 301, (2, 21), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def world_group() -> TensorGroup:
    dist = torch.distributed
    return TensorGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def gradients(
    fields: dict[str, Any], group: TensorGroup, recompute: Recompute | None, dropout: DropoutStreams | None
) -> dict[str, Tensor]:
    """Train one microbatch with packed documents and weighted losses; the loss and every gradient, by name."""
    config = model_config(fields)
    stage = Stage(config, range(3), index=0, num_stages=1, group=group, recompute=recompute)
    stage.initialise(seed=1)
    weights = torch.linspace(0, 1, 40).view(2, 20)
    packing = PackedDocuments(cu_seqlens(((4, 13, 3), (20,))), None)
    loss = loss_of([stage], Microbatch(*batch(), packing, weights, dropout))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in stage.named_parameters() if p.grad is not None}}


def compare(fields: dict[str, Any], recompute: Recompute, dropout: DropoutStreams | None) -> None:
    expected = gradients(fields, world_group(), None, dropout)
    found = gradients(fields, world_group(), recompute, dropout)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("recompute", MODES.values(), ids=MODES.keys())
def test_loss_and_gradients_are_those_of_kept_activations(recompute: Recompute, fields: dict[str, Any]) -> None:
    run_distributed(compare, 1, fields, recompute, DROPOUT)


@pytest.mark.parametrize("recompute", MODES.values(), ids=MODES.keys())
def test_tensor_ranks_recompute_together(recompute: Recompute) -> None:
    run_distributed(compare, 2, FAMILIES["llama, tied"], recompute, DROPOUT)


def test_an_uneven_share_is_filled_up() -> None:
    # 40 tokens of 33 hidden numbers, shared by two heads and two ranks.
    fields = GPT2 | {"hidden_size": 33, "head_dim": 8, "num_attention_heads": 2}
    run_distributed(compare, 2, fields | {"vocab_size": 303}, Recompute("full", partition=True), None)


class Storages(TorchDispatchMode):
    """Every storage that an operation made, by a reference that does not keep it; views of `others` make none."""

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        self.others = {tensor.untyped_storage().data_ptr() for tensor in others}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.others:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = (reference, storage.nbytes())
        return result

    def alive(self) -> int:
        """Bytes of what was made and is still held."""
        return sum(size for reference, size in self.made.values() if not reference.expired())


HIDDEN = 256 * 32 * 4
"""Bytes of the hidden states of a row."""


def kept_bytes(recompute: Recompute | None, group: TensorGroup) -> int:
    """Bytes that live on after the forward of twelve layers, its result left out."""
    fields = GPT2 | {"num_hidden_layers": 12, "max_position_embeddings": 256, "initializer_range": 0.02}
    stage = Stage(model_config(fields), range(12), index=1, num_stages=3, group=group, recompute=recompute)
    stage.initialise(seed=1)
    x = torch.randn(1, 256, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dropout = dropout_streams(fields, 1, (7,), 256, 0.1, 0.1)
    with Storages([*stage.parameters(), x, dropout.token_keys, dropout.site_keys]) as storages:
        result = stage({"hidden": x}, microbatch=Microbatch(dropout=dropout)).activations["hidden"]
    if group.size > 1:
        time.sleep(0.5)  # gloo's threads let go of a tensor a moment after its result is there
    kept = storages.alive() - HIDDEN
    result.sum().backward()
    assert x.grad is not None
    return kept


def test_what_is_kept_shrinks_with_what_is_recomputed() -> None:
    modes = (None, Recompute("selective"), Recompute("full", every=2), Recompute("full"), Recompute("full", segment=3))
    nothing, selective, half, full, segments = (kept_bytes(mode, TensorGroup()) for mode in modes)
    # The first of twelve inputs is held by the caller.
    assert full == 11 * HIDDEN
    assert segments == 3 * HIDDEN
    assert nothing > selective > full
    assert abs(half - nothing / 2) < 7 * HIDDEN
    # Of each layer and head the probabilities, before and after dropout.
    assert nothing - selective > 12 * 4 * 256 * 256 * 4


def divided() -> None:
    whole = kept_bytes(Recompute("full"), world_group())
    assert whole == 11 * HIDDEN
    # A share of each, the first among them.
    share = kept_bytes(Recompute("full", partition=True), world_group())
    assert share == 12 * HIDDEN // 2, share / HIDDEN


def test_tensor_ranks_divide_what_is_kept() -> None:
    run_distributed(divided, 2)


def test_evaluation_keeps_nothing_and_recomputes_nothing() -> None:
    config = model_config(GPT2)
    for recompute in (Recompute("full", partition=True), Recompute("selective")):
        stage = Stage(config, range(3), index=0, num_stages=1, group=TensorGroup(), recompute=recompute)
        plain = Stage(config, range(3), index=0, num_stages=1, group=TensorGroup())
        stage.initialise(seed=1)
        plain.initialise(seed=1)
        with torch.no_grad():
            assert torch.equal(loss_of([stage], Microbatch(*batch())), loss_of([plain], Microbatch(*batch())))
