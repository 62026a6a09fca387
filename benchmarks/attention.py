"""Causal attention on a CPU: torch's fused kernel beside plain matrix products; writes results/attention.md.

python benchmarks/attention.py
"""

import time
from pathlib import Path

import torch
from machine import describe

from megalite.model import causal_attention

RESULT = Path(__file__).parent / "results" / "attention.md"
SHAPE = (2, 512, 8, 64)
REPEATS = 15


def main() -> None:
    """Time both in turn, on one thread, and write the table."""
    torch.set_num_threads(1)
    limit = causal_attention.WRITTEN_OUT_SCORES
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [torch.randn(SHAPE).to(dtype).requires_grad_() for _ in range(3)]
        gradient = torch.randn(SHAPE).to(dtype)
        seconds: dict[str, list[tuple[float, float]]] = {"torch's kernel": [], "plain products": []}
        for _ in range(REPEATS):
            for name, scores in (("torch's kernel", 0), ("plain products", limit)):
                causal_attention.WRITTEN_OUT_SCORES = scores
                seconds[name].append(timed(tensors, gradient))
        for name, found in seconds.items():
            forward, backward = (sorted(column)[REPEATS // 2] * 1e3 for column in zip(*found, strict=True))
            rows.append(f"| {name} | {str(dtype).removeprefix('torch.')} | {forward:.1f} | {backward:.1f} |")
    lines = [
        "# Causal attention on a CPU",
        "",
        "`python benchmarks/attention.py`",
        "",
        describe().markdown(),
        f"`[B, S, heads, D] = {list(SHAPE)}`, one thread, CPU milliseconds, medians of {REPEATS}, in turn.",
        "",
        "| | precision | forward | backward |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
    ]
    RESULT.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def timed(tensors: list[torch.Tensor], gradient: torch.Tensor) -> tuple[float, float]:
    """CPU seconds of one forward and one backward."""
    begin = time.process_time()
    query, key, value = tensors
    output = causal_attention.causal_attention(query, key, value)
    middle = time.process_time()
    output.backward(gradient)
    return middle - begin, time.process_time() - middle


if __name__ == "__main__":
    main()
