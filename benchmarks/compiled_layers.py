"""Compiled layers on a CPU: forward and backward of a stage of two layers, compiled and eager.

Writes results/compiled_layers.md: python benchmarks/compiled_layers.py
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from machine import describe
from torch import Tensor

from megalite.config import read_model
from megalite.model.dropout import DropoutStreams
from megalite.model.microbatch import Microbatch
from megalite.model.stage import HIDDEN, Stage
from megalite.parallel.tensor_group import TensorGroup

RESULT = Path(__file__).parent / "results" / "compiled_layers.md"
ROWS, LENGTH, WIDTH = 2, 512, 768
SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "vocab_size": 512,
    "max_position_embeddings": LENGTH,
}
MODELS: dict[str, dict[str, object]] = {
    "llama": {"architecture": "llama", "intermediate_size": 2048},
    "gpt2": {"architecture": "gpt2"},
    "gpt2, dropout 0.1": {"architecture": "gpt2", "hidden_dropout": 0.1, "attention_dropout": 0.1},
}
REPEATS = 9


def main() -> None:
    """Time the stages in turn, on one thread, and write the table."""
    torch.set_num_threads(1)
    rows = [row(name, fields, dtype) for name, fields in MODELS.items() for dtype in (torch.bfloat16, torch.float32)]
    lines = [
        "# Compiled layers on a CPU",
        "",
        "`python benchmarks/compiled_layers.py`",
        "",
        describe().markdown(),
        f"Two layers, hidden {WIDTH}, 12 heads, a microbatch `[B, S] = {[ROWS, LENGTH]}`, one thread, CPU milliseconds "
        f"of forward and backward, medians of {REPEATS}, in turn. The first step, in CPU seconds of this process, "
        "compiles.",
        "",
        "| model | precision | eager | compiled | ratio | first step |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]
    RESULT.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def row(name: str, fields: Mapping[str, object], dtype: torch.dtype) -> str:
    """Time one model in one precision."""
    torch.compiler.reset()
    config = read_model({**SHAPE, **fields})
    dropout = DropoutStreams.of(config, 1, range(ROWS), LENGTH, torch.device("cpu"))
    stages = [
        Stage(config, (1, 2), index=1, num_stages=3, group=TensorGroup(), compiled=compiled).to(dtype)
        for compiled in (False, True)
    ]
    for stage in stages:
        stage.initialise(1)
    x = torch.randn(ROWS, LENGTH, WIDTH).to(dtype).requires_grad_()
    microbatch = Microbatch(dropout=dropout)
    first = timed(stages[1], x, microbatch)
    seconds: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for stage, found in zip(stages, seconds, strict=True):
            found.append(timed(stage, x, microbatch))
    eager, compiled = (sorted(found)[REPEATS // 2] * 1e3 for found in seconds)
    precision = str(dtype).removeprefix("torch.")
    return f"| {name} | {precision} | {eager:.0f} | {compiled:.0f} | {eager / compiled:.2f} | {first:.0f} |"


def timed(stage: Stage, x: Tensor, microbatch: Microbatch) -> float:
    """CPU seconds of one forward and backward."""
    begin = time.process_time()
    stage({HIDDEN: x}, microbatch=microbatch).activations[HIDDEN].sum().backward()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
