"""Layers compiled as one graph: the same loss and gradients as eager ones, and no compilation beside the first two."""

from functools import partial
from typing import Any

import pytest
import torch
from cut_stages import (
    GPT2,
    LLAMA,
    NEOX,
    QK_NORM,
    cu_seqlens,
    cut_stages,
    documents_at,
    dropout_streams,
    loss_of,
    model_config,
    whole_weights,
)
from harness import run_distributed
from torch import Tensor
from torch._dynamo.utils import counters

from megalite.config import Recompute
from megalite.model import compilation, packing
from megalite.model.kv_cache import KVCache
from megalite.model.microbatch import Microbatch
from megalite.model.stage import Stage

ROWS, LENGTH = 2, 20
BOUNDARIES = ([[3, 4, 15], []], [[5], [2, 9]], [[], []], [[7], []])
"""Of each microbatch and row, where further documents begin: the number of documents differs."""
LLAMA_ONE_KV_HEAD = QK_NORM | {"num_key_value_heads": 1}


def microbatches(fields: dict[str, Any], *, packed: bool, dropout: float) -> list[Microbatch]:
    tokens = torch.randint(0, fields["vocab_size"], (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    return [
        Microbatch(
            tokens[:, :-1],
            tokens[:, 1:],
            documents_at(boundaries, LENGTH) if packed else None,
            dropout=dropout_streams(fields, 1, (number, 99), LENGTH, dropout, dropout) if dropout else None,
        )
        for number, boundaries in enumerate(BOUNDARIES)
    ]


def trace(stages: list[Stage], batches: list[Microbatch]) -> tuple[list[float], list[Tensor | None]]:
    """The losses of microbatches and of one without gradients, and the gradients of all."""
    losses = [loss_of(stages, microbatch) for microbatch in batches]
    torch.stack(losses).sum().backward()
    with torch.no_grad():
        losses.append(loss_of(stages, batches[0]))
    return [float(loss) for loss in losses], [p.grad for stage in stages for p in stage.parameters()]


def compare(fields: dict[str, Any], packed: bool, dropout: float, options: dict[str, Any]) -> dict[str, int]:
    config, batches = model_config(fields), microbatches(fields, packed=packed, dropout=dropout)
    weights = whole_weights(config)
    eager = cut_stages(config, weights, 2, rows=ROWS, **options)
    # The graphs are traced, divided into forward and backward, and run by torch's own kernels.
    compilation.BACKEND = "aot_eager"
    compiled = cut_stages(config, weights, 2, rows=ROWS, compiled=True, **options)
    losses, gradients = trace(compiled, batches)
    expected, expected_gradients = trace(eager, batches)
    assert losses == pytest.approx(expected, rel=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    assert not counters["graph_break"]
    return dict(counters["stats"])


QUICK: dict[str, tuple[dict[str, Any], bool, float, dict[str, Any]]] = {
    "gpt2, all": (GPT2, True, 0.1, {"sequence_parallel": True, "overlap": True}),
    "llama, packed, recomputed": (LLAMA, True, 0.0, {"recompute": Recompute("full")}),
}
CASES = QUICK | {
    "llama": (LLAMA, False, 0.0, {}),
    "llama, 1 kv head, all": (LLAMA_ONE_KV_HEAD, True, 0.1, {"sequence_parallel": True}),
    "gpt_neox, dropout": (NEOX, False, 0.1, {}),
    "gpt2, scores recomputed": (GPT2, False, 0.1, {"recompute": Recompute("selective")}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.full) for case in CASES]
)
def test_a_compiled_layer_is_the_eager_one_on_two_tensor_ranks(case: str) -> None:
    for stats in run_distributed(compare, 2, *CASES[case], timeout=300.0):
        # One graph for three layers and four microbatches, and one without gradients.
        assert stats["unique_graphs"] == 2


@pytest.mark.parametrize("first", [1, 2, 9])
def test_any_number_of_documents_is_served_by_one_compilation(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    number = compilation.compile_layer(partial(packing.document_numbers, rows=1, length=LENGTH))
    for documents in (first, 1, 2, 3, LENGTH):
        lengths = [*[1] * (documents - 1), LENGTH - documents + 1]
        boundaries = cu_seqlens([lengths])
        compilation.declare_dynamic(packing.PackedDocuments(boundaries, None))
        expected = torch.repeat_interleave(torch.arange(documents), torch.tensor(lengths))
        assert torch.equal(number(boundaries)[0], expected)
    assert counters["stats"]["unique_graphs"] == 1


def generate() -> dict[str, int]:
    config = model_config(LLAMA)
    (stage,) = cut_stages(config, whole_weights(config), 1, compiled=True)
    with torch.no_grad():
        cache = KVCache([5, 3], num_layers=3, device=torch.device("cpu"))
        stage.next_logits(torch.ones(2, 5, dtype=torch.int64), cache)
        stage.next_logits(torch.ones(2, 1, dtype=torch.int64), cache)
    return dict(counters["stats"])


def test_text_is_generated_eagerly() -> None:
    assert run_distributed(generate, 1) == [{}]
