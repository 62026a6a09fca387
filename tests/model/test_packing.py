"""Documents packed into rows: each trains as if it stood alone, under every cut of the model."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from cut_stages import (
    GPT2,
    LLAMA,
    LLAMA3,
    NEOX,
    QK_NORM,
    SHAPE,
    assert_gradients_agree,
    cu_seqlens,
    cut_stages,
    documents_at,
    dropout_streams,
    loss_of,
    model_config,
    whole_weights,
)
from harness import run_distributed
from reference_model import ReferenceModel
from torch import Tensor

from megalite.kernels.choice import Kernels
from megalite.model import causal_attention as module
from megalite.model import packing
from megalite.model.causal_attention import causal_attention
from megalite.model.microbatch import Microbatch
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup

LENGTH = 20
BOUNDARIES = [[3, 4, 15], []]
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, 2 kv heads": LLAMA | {"num_key_value_heads": 2},
    "llama, 1 kv head": LLAMA | {"num_key_value_heads": 1},
    "llama 3 positions, normed heads": QK_NORM | {"rope_scaling": LLAMA3},
    "gpt2": GPT2,
    "gpt_neox": NEOX,
}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, targets and loss weights, some of them 0, ``[2, LENGTH]``."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, LENGTH + 1), generator=generator)
    weights = torch.rand(2, LENGTH, generator=generator)
    weights[:, ::5] = 0.0
    return tokens[:, :-1], tokens[:, 1:], weights / weights.sum()


def spans() -> list[tuple[int, slice]]:
    """(row, place in it) of each document."""
    ends = [(0, *row, LENGTH) for row in BOUNDARIES]
    return [(row, slice(*span)) for row, bounds in enumerate(ends) for span in pairwise(bounds)]


def document_numbers() -> Tensor:
    numbers = torch.zeros(2, LENGTH, dtype=torch.int64)
    for number, (row, span) in enumerate(spans()):
        numbers[row, span] = number
    return numbers


def loss_one_by_one(reference: ReferenceModel) -> Tensor:
    ids, targets, weights = batch()
    losses = [
        (reference.losses(ids[row, span][None], targets[row, span][None]) * weights[row, span]).sum()
        for row, span in spans()
    ]
    return torch.stack(losses).sum()


def loss_under_a_mask(reference: ReferenceModel) -> Tensor:
    """With positions that run on over the row."""
    ids, targets, weights = batch()
    return (reference.losses(ids, targets, documents=document_numbers()) * weights).sum()


def loss_at_reset_positions(reference: ReferenceModel) -> Tensor:
    """With attention over the whole row."""
    ids, targets, weights = batch()
    positions = torch.stack(
        [torch.cat([torch.arange(b - a) for a, b in pairwise((0, *r, LENGTH))]) for r in BOUNDARIES]
    )
    return (reference.losses(ids, targets, positions) * weights).sum()


RULES = {
    "one by one": (loss_one_by_one, {}),
    "running positions": (loss_under_a_mask, {"reset_positions": False}),
    "whole attention": (loss_at_reset_positions, {"split_attention": False}),
}


def compare(fields: dict[str, Any], num_stages: int, rule: str) -> None:
    config, (ids, targets, loss_weights) = model_config(fields), batch()
    expected_loss, options = RULES[rule]
    weights = whole_weights(config)
    reference = ReferenceModel(config, weights)
    expected = expected_loss(reference)
    expected.backward()

    packing = documents_at(BOUNDARIES, LENGTH, **options)
    stages = cut_stages(config, weights, num_stages)
    loss = loss_of(stages, Microbatch(ids, targets, packing, loss_weights))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert_gradients_agree(stages, reference)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(("world_size", "num_stages"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_documents_train_as_the_plain_model_says(
    fields: dict[str, Any], world_size: int, num_stages: int, rule: str
) -> None:
    run_distributed(compare, world_size, fields, num_stages, rule)


def whole_stage(fields: dict[str, Any]) -> Stage:
    stage = Stage(model_config(fields), range(3), index=0, num_stages=1, group=TensorGroup())
    stage.initialise(seed=2)
    return stage


@pytest.mark.parametrize("fields", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_one_document_a_row_is_the_unpacked_row(fields: dict[str, Any]) -> None:
    stage, (ids, targets, _) = whole_stage(fields), batch()
    plain = loss_of([stage], Microbatch(ids, targets))
    plain.backward()
    gradients = [parameter.grad for parameter in stage.parameters()]
    stage.zero_grad()
    alone = loss_of([stage], Microbatch(ids, targets, documents_at([[], []], LENGTH)))
    alone.backward()
    assert torch.equal(alone, plain)
    # Learned positions are summed into their table in another order, so not bit for bit.
    for parameter, gradient in zip(stage.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("lengths", [((20,), (20,)), ((20,), (4, 16)), ((1, 1, 18), (19, 1))])
def test_tokens_know_the_number_of_their_document(lengths: tuple[tuple[int, ...], ...]) -> None:
    expected = torch.repeat_interleave(torch.tensor([length for row in lengths for length in row])).view(2, 20)
    assert torch.equal(packing.document_numbers(cu_seqlens(lengths), 2, 20), expected)


def test_equal_weights_give_the_mean_and_weights_of_0_nothing() -> None:
    stage, (ids, targets, _) = whole_stage(LLAMA), batch()
    mean = loss_of([stage], Microbatch(ids, targets))
    same = loss_of([stage], Microbatch(ids, targets, loss_weights=torch.full(ids.shape, 1 / ids.numel())))
    torch.testing.assert_close(same, mean, rtol=1e-6, atol=0.0)
    half = torch.zeros(ids.shape)
    half[:, :10] = 0.25
    weighted = loss_of([stage], Microbatch(ids, targets, loss_weights=half))
    first_half = loss_of([stage], Microbatch(ids[:, :10], targets[:, :10]))
    torch.testing.assert_close(weighted, 5.0 * first_half, rtol=1e-6, atol=0.0)


def attention_over_documents(query: Tensor, key: Tensor, value: Tensor, documents: Tensor) -> Tensor:
    """As on an accelerator, where the host does not know the lengths of documents."""
    return module._over_documents(query, key, value, documents, None)


def flash_over_boundaries(query: Tensor, key: Tensor, value: Tensor, documents: Tensor) -> Tensor:
    """As on a GPU in 16 bits, by what the documentation of `varlen_attn` says of its arguments, one by one."""

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        window_size: tuple[int, int],
    ) -> Tensor:
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k >= int(cu_q.diff().max())
        assert window_size == (-1, 0), "not causal"
        spans = [slice(*span) for span in pairwise(cu_q.tolist())]
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        attended = [F.scaled_dot_product_attention(q[:, s], k[:, s], v[:, s], is_causal=True) for s in spans]
        return torch.cat([x.transpose(0, 1) for x in attended])

    with patch.multiple(module, varlen_attn=varlen, _has_flash_attention=lambda query: True):
        return module._over_documents(query, key, value, documents, None)


WAYS: dict[str, Callable[..., Tensor]] = {
    "by document, written out": causal_attention,
    "by document, fused": partial(causal_attention, kernels=Kernels(attention="fused")),
    "over documents": attention_over_documents,
    "over boundaries": flash_over_boundaries,
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("way", WAYS)
def test_attention_agrees_with_a_dense_mask(kv_heads: int, way: str) -> None:
    lengths = ((150, 1, 9, 240), (1, 1, 398), (400,))
    generator = torch.Generator().manual_seed(kv_heads)
    query, key, value = (
        torch.randn(3, 400, heads, 16, generator=generator).requires_grad_() for heads in (4, kv_heads, kv_heads)
    )
    output = WAYS[way](query, key, value, cu_seqlens(lengths))
    output.square().sum().backward()

    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    numbers = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    mask = (numbers[:, :, None] == numbers[:, None, :]) & torch.ones(400, 400, dtype=torch.bool).tril()
    q, k, v = (x.transpose(1, 2) for x in exact)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True).transpose(1, 2)
    expected.square().sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip((query, key, value), exact, strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)


def test_dropout_over_documents_is_that_of_each_document() -> None:
    lengths = ((150, 1, 9, 240), (1, 1, 398))
    query = torch.randn(2, 400, 4, 16, generator=torch.Generator().manual_seed(1))
    dropout = dropout_streams(LLAMA, 5, (3, 4), 400, 0.0, 0.3).for_layer(1).scores(range(4))
    documents = cu_seqlens(lengths)
    each = causal_attention(query, query, query, documents, dropout)
    at_once = module._over_documents(query, query, query, documents, dropout)
    torch.testing.assert_close(at_once, each, rtol=1e-5, atol=1e-6)


def test_the_scores_kept_for_the_backward_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def count(query: Tensor, key: Tensor, value: Tensor, dropout: None) -> Tensor:
        kept.append(query.shape[:3].numel() * query.shape[2])
        return query

    monkeypatch.setattr(module, "WRITTEN_OUT_SCORES", 4 * 1000 * 100)
    monkeypatch.setattr(module, "_written_out", count)
    query = torch.randn(1, 1000, 4, 8)
    causal_attention(query, query, query, cu_seqlens([[100] * 10]))
    assert len(kept) == 10
    assert sum(kept) == module.WRITTEN_OUT_SCORES
    kept.clear()
    causal_attention(query, query, query, cu_seqlens([[101] * 9 + [91]]))
    assert len(kept) == 1
