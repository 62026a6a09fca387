"""Causal attention, within packed documents if there are any, with dropout of the probabilities.

| documents | dropout | device and mode       | implementation                                                 |
|-----------|---------|-----------------------|----------------------------------------------------------------|
| no        | no      | all                   | plain matrix products or torch's fused kernel, as `Kernels` say |
| no        | yes     | all                   | plain matrix products                                          |
| yes       | both    | CPU, eager            | document by document, as above                                 |
| yes       | no      | CUDA, 16 bits         | FlashAttention over `cu_seqlens` (`varlen_attn`)               |
| yes       | no      | else                  | torch's fused kernel under a mask ``[B, 1, S, S]``             |
| yes       | yes     | CUDA, or compiled     | plain matrix products under a mask                             |

Document by document no scores between documents are computed and no mask is needed, but the lengths must be on the
host: on an accelerator that would be a synchronisation, and under torch.compile a compilation for every microbatch.

Legend for shapes: B microbatch, S sequence, N local query heads, K local key-value heads, D head dim.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.choice import NATIVE, AttentionKernel, Kernels
from megalite.model.dropout import AttentionDropout
from megalite.model.packing import document_numbers

# On a CPU with bf16 units, plain matrix products take half the time of torch's fused kernel (benchmarks/attention.py);
# on other CPUs they take as long. They save the scores for the backward, so their number is limited: 16 MiB of bf16 per
# layer and microbatch, of which each document may use the share of its tokens.
WRITTEN_OUT_SCORES = 1 << 23


def causal_attention(
    query_BSND: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    cu_seqlens: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    kernels: Kernels = NATIVE,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v under the causal mask, ``[B, S, N, D]``; query head i reads head i*K//N.

    `cu_seqlens` cuts the flattened rows into documents (`PackedDocuments`); attention is limited to a document.
    `dropout` of the probabilities needs memory for all of them, and a byte each for the mask, on any device. Where
    `kernels` upcast 16-bit products, all of attention is computed in fp32 and rounded at the end.
    """
    dtype = query_BSND.dtype
    query, key, value = kernels.upcast(query_BSND, key_BSKD, value_BSKD)
    if cu_seqlens is None:
        attended = _whole_rows(query, key, value, dropout, kernels.attention, query.shape[:2].numel())
    elif query.device.type == "cpu" and not torch.compiler.is_compiling():
        attended = _by_document(query, key, value, cu_seqlens.tolist(), dropout, kernels.attention)
    else:
        attended = _over_documents(query, key, value, cu_seqlens, dropout)
    return attended.to(dtype)


def _whole_rows(
    query_BSND: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    dropout: AttentionDropout | None,
    kernel: AttentionKernel,
    microbatch_tokens: int,
) -> Tensor:
    """Attention within each row; the rows may be a part of a microbatch of `microbatch_tokens` tokens."""
    query, key, value = _heads_first(query_BSND, key_BSKD, value_BSKD)
    heads, length = query.shape[1:3]
    fits = query.device.type == "cpu" and heads * length * microbatch_tokens <= WRITTEN_OUT_SCORES
    if dropout is not None or (kernel == "written_out" and fits):
        attended = _written_out(query, key, value, dropout)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attended.transpose(1, 2)


def _by_document(
    query_BSND: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    boundaries: list[int],
    dropout: AttentionDropout | None,
    kernel: AttentionKernel,
) -> Tensor:
    rows, length = query_BSND.shape[:2]
    tokens = rows * length
    if len(boundaries) == rows + 1:
        return _whole_rows(query_BSND, key_BSKD, value_BSKD, dropout, kernel, tokens)
    lengths = [end - start for start, end in pairwise(boundaries)]
    queries, keys, values = (
        x.flatten(0, 1).unsqueeze(0).split(lengths, dim=1) for x in (query_BSND, key_BSKD, value_BSKD)
    )
    dropouts = [
        dropout and dropout.span(*divmod(start, length), count)
        for start, count in zip(boundaries, lengths, strict=False)
    ]
    attended = [
        _whole_rows(*documents, kernel, tokens) for documents in zip(queries, keys, values, dropouts, strict=True)
    ]
    return torch.cat(attended, dim=1).view(query_BSND.shape)


def varlen_attn(*arguments: Any, **settings: Any) -> Any:
    """Call torch's attention over documents, which is imported at first use: its import loads torch's compiler."""
    from torch.nn.attention.varlen import varlen_attn as attend

    return attend(*arguments, **settings)


def _over_documents(
    query_BSND: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, cu_seqlens: Tensor, dropout: AttentionDropout | None
) -> Tensor:
    """Attention within documents in one call, whose boundaries the host does not read."""
    rows, length = query_BSND.shape[:2]
    query, key, value = _heads_first(query_BSND, key_BSKD, value_BSKD)
    if dropout is None and _has_flash_attention(query):
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        attended = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, length, length, window_size=(-1, 0))
        assert isinstance(attended, Tensor)
        return attended.view(query_BSND.shape)
    numbers_BS = document_numbers(cu_seqlens, rows, length)
    if dropout is not None:
        return _written_out(query, key, value, dropout, numbers_BS).transpose(1, 2)
    mask_BSS = numbers_BS[:, :, None] == numbers_BS[:, None, :]
    mask_BSS = mask_BSS.tril()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask_BSS.unsqueeze(1)).transpose(1, 2)


def _has_flash_attention(query: Tensor) -> bool:
    return query.device.type == "cuda" and query.dtype != torch.float32 and query.shape[-1] in range(8, 257, 8)


def _heads_first(query_BSND: Tensor, key_BSKD: Tensor, value_BSKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as ``[B, N, S, D]``."""
    query, key, value = (x.transpose(1, 2) for x in (query_BSND, key_BSKD, value_BSKD))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # Expanded here, since with torch's flag for grouped queries not every kernel is fused.
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return query, key, value


def _written_out(
    query_BNSD: Tensor,
    key_BNSD: Tensor,
    value_BNSD: Tensor,
    dropout: AttentionDropout | None = None,
    document_numbers_BS: Tensor | None = None,
) -> Tensor:
    """Causal attention as plain matrix products, in strips of queries that skip the keys after the strip."""
    batch, heads, length, width = query_BNSD.shape
    query, key, value = (x.reshape(batch * heads, length, width) for x in (query_BNSD, key_BNSD, value_BNSD))
    mask = query.new_full((length, length), float("-inf")).triu_(1)
    strip = max(128, -(-length // 4))
    outputs = []
    for start in range(0, length, strip):
        end = min(start + strip, length)
        scores = torch.baddbmm(
            mask[start:end, :end], query[:, start:end], key[:, :end].transpose(1, 2), alpha=width**-0.5
        )
        if document_numbers_BS is not None:
            other = document_numbers_BS[:, start:end, None] != document_numbers_BS[:, None, :end]
            scores = scores.unflatten(0, (batch, heads)).masked_fill(other.unsqueeze(1), float("-inf")).flatten(0, 1)
        probabilities = scores.softmax(-1)
        if dropout is not None:
            probabilities = dropout.apply(probabilities, start)
        outputs.append(probabilities @ value[:, :end])
    return torch.cat(outputs, dim=1).view(batch, heads, length, width)
