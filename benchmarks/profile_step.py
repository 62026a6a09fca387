"""Where a training step's time goes, by part, on one rank: writes results/profile_step.md.

    python benchmarks/profile_step.py [--dtype bf16] [--steps 3]

Every operator's CPU time is charged to the part of megalite, or of DeepSpeed, that called it.
"""

import argparse
import os
import socket
import time
from collections import defaultdict
from pathlib import Path

import torch
from contender_megalite import Megalite
from machine import describe
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function
from workload import Job

from megalite.model import transformer
from megalite.model.embedding import Embedding, Head
from megalite.pipeline import executor
from megalite.tensor_parallel import layers
from megalite.tensor_parallel.cross_entropy import VocabParallelLogits

RESULT = Path(__file__).parent / "results" / "profile_step.md"
FORWARD = {
    "attention: products and softmax": (transformer, "causal_attention"),
    "attention: rotary": (transformer.Rotary, "__call__"),
    "linear layers": (layers.ColumnParallelLinear, "forward"),
    "linear layers ": (layers.RowParallelLinear, "forward"),
    "norms": (torch.nn.RMSNorm, "forward"),
    "embedding": (Embedding, "forward"),
    "head and loss": (Head, "forward"),
    "head and loss ": (VocabParallelLogits, "cross_entropy"),
    "MLP: gate times up": (transformer.SwiGLU, "forward"),
    "residual sums and the rest of a block": (transformer.Block, "forward"),
}


def main() -> None:
    """Profile some steps and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part, (owner, name) in FORWARD.items():
        label(owner, name, part.strip())
    label(executor.PipelineExecutor, "run", "pipeline and engine, around the model")
    contender = Megalite(Job(dtype=arguments.dtype), "one")
    contender.setup(0, 1, int(os.environ["MASTER_PORT"]))
    label(type(contender.trainer.engine), "step", "optimizer step: norm, clipping, AdamW, casts")
    contender.step()
    started = time.process_time()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(arguments.steps):
            contender.step()
    seconds = (time.process_time() - started) / arguments.steps
    contender.teardown()
    parts = charge(found.events(), arguments.steps)
    report(parts, seconds, arguments)


def label(owner: object, name: str, part: str) -> None:
    """Record every call of a function under the name of its part."""
    plain = getattr(owner, name)

    def labelled(*args: object, **kwargs: object) -> object:
        with record_function(f"part: {part}"):
            return plain(*args, **kwargs)

    setattr(owner, name, labelled)


def charge(events: object, steps: int) -> dict[str, float]:
    """Return seconds a step by part; a backward operator belongs to the part whose forward made it."""
    events = list(events)  # pyright: ignore[reportArgumentType]
    part_of_sequence: dict[tuple[int, int], str] = {}
    for event in events:
        if event.sequence_nr >= 0 and (part := enclosing(event)):
            part_of_sequence.setdefault((event.fwd_thread or event.thread, event.sequence_nr), part)
    parts: dict[str, float] = defaultdict(float)
    for event in events:
        if event.name.startswith("part: "):
            continue
        part, backward = enclosing(event), ""
        top = event
        while top is not None and "evaluate_function" not in top.name:
            top = top.cpu_parent
        if top is not None:
            part = part_of_sequence.get((top.fwd_thread, top.sequence_nr), "gradient accumulation and reduction")
            backward = ", backward"
        parts[(part or "data, reduction over ranks, bookkeeping") + backward] += event.self_cpu_time_total / 1e6 / steps
    return parts


def enclosing(event: object) -> str | None:
    """Return the innermost part that an event ran in."""
    parent = event.cpu_parent  # pyright: ignore[reportAttributeAccessIssue]
    while parent is not None:
        if parent.name.startswith("part: "):
            return parent.name.removeprefix("part: ")
        parent = parent.cpu_parent
    return None


def report(parts: dict[str, float], seconds: float, arguments: argparse.Namespace) -> None:
    """Print the table and write it."""
    total = sum(parts.values())
    rows = sorted(parts.items(), key=lambda row: -row[1])
    rows = [row for row in rows if row[1] >= 0.002 * total]
    table = Table(title=f"one training step, {arguments.dtype}, by part")
    for column in ("part", "s/step", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, value in rows:
        table.add_row(part, f"{value:.3f}", f"{value / total:.1%}")
    Console().print(table)
    lines = [
        f"# Where a training step goes, {arguments.dtype}",
        "",
        f"`python benchmarks/profile_step.py --dtype {arguments.dtype} --steps {arguments.steps}`",
        "",
        describe().markdown()
        + f"- the job of train_step.md at one process of one thread, ZeRO-1; {seconds:.2f} CPU seconds a step",
        "",
        "| part | s/step | share |",
        "| --- | --- | --- |",
        *(f"| {part} | {value:.3f} | {value / total:.1%} |" for part, value in rows),
        "",
    ]
    RESULT.write_text("\n".join(lines), encoding="utf-8")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    main()
