"""Packed attention on a CPU: document by document, beside a dense mask and whole rows.

Writes results/packed_attention.md: python benchmarks/packed_attention.py
"""

import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe
from torch import Tensor

from megalite.model.causal_attention import causal_attention

RESULT = Path(__file__).parent / "results" / "packed_attention.md"
SHAPE = (1, 2048, 8, 64)
DOCUMENTS = (8, 128)
REPEATS = 9


def main() -> None:
    """Time the ways in turn, on one thread, and write the table."""
    torch.set_num_threads(1)
    rows = [
        row for documents in DOCUMENTS for dtype in (torch.bfloat16, torch.float32) for row in table(documents, dtype)
    ]
    lines = [
        "# Packed attention on a CPU",
        "",
        "`python benchmarks/packed_attention.py`",
        "",
        describe().markdown(),
        f"`[B, S, heads, D] = {list(SHAPE)}`, a row cut at random into documents, one thread, CPU milliseconds, "
        f"medians of {REPEATS}, in turn.",
        "",
        "| | documents | precision | forward | backward |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]
    RESULT.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def table(documents: int, dtype: torch.dtype) -> list[str]:
    """Time every way over one row of so many documents."""
    lengths = random_spans(documents)
    mask, cu_seqlens = block_diagonal(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "document by document": lambda query, key, value: causal_attention(query, key, value, cu_seqlens),
        "dense mask": lambda query, key, value: under_mask(query, key, value, mask),
        "whole row": causal_attention,
    }
    tensors = [torch.randn(SHAPE).to(dtype).requires_grad_() for _ in range(3)]
    gradient = torch.randn(SHAPE).to(dtype)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            seconds[name].append(timed(way, tensors, gradient))
    rows = []
    for name, found in seconds.items():
        forward, backward = (sorted(column)[REPEATS // 2] * 1e3 for column in zip(*found, strict=True))
        rows.append(f"| {name} | {documents} | {str(dtype).removeprefix('torch.')} | {forward:.1f} | {backward:.1f} |")
    return rows


def random_spans(documents: int) -> list[int]:
    """Lengths of documents whose bounds are drawn at random."""
    length = SHAPE[1]
    cuts = torch.randperm(length - 1, generator=torch.Generator().manual_seed(1))[: documents - 1] + 1
    return [end - start for start, end in pairwise([0, *sorted(cuts.tolist()), length])]


def block_diagonal(lengths: list[int]) -> Tensor:
    """The mask of a whole row, bool ``[S, S]``."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (numbers[:, None] == numbers) & (torch.arange(len(numbers))[:, None] >= torch.arange(len(numbers)))


def under_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The same attention by torch's kernel with a mask."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def timed(
    way: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor], gradient: Tensor
) -> tuple[float, float]:
    """CPU seconds of one forward and one backward."""
    begin = time.process_time()
    output = way(*tensors)
    middle = time.process_time()
    output.backward(gradient)
    return middle - begin, time.process_time() - middle


if __name__ == "__main__":
    main()
