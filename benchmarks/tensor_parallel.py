"""Collectives of the tensor axis: whole tokens or divided ones, after the products of a backward or beside them.

    python benchmarks/tensor_parallel.py                   # two ranks on this machine, a few minutes
    python benchmarks/tensor_parallel.py --rounds 5 --dtype fp32

Both ranks hold the same blocks once for each way, and run a forward and a backward of each in turn, so that whatever
else the machine does hits all alike. Ratios are medians over the rounds. Writes results/tensor_parallel.md.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from machine import describe

from megalite.model.families.llama.config import LlamaConfig
from megalite.model.microbatch import Microbatch
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup

RESULT = Path(__file__).parent / "results" / "tensor_parallel.md"
RANKS, ROWS, LENGTH = 2, 2, 512
MODEL = LlamaConfig(
    architecture="llama",
    vocab_size=8192,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    intermediate_size=1408,
    max_position_embeddings=LENGTH,
)
WAYS = {
    "whole tokens": (False, False),
    "whole tokens, beside": (False, True),
    "divided tokens": (True, False),
    "divided tokens, beside": (True, True),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward on one rank: wall and CPU seconds, and bytes that the forward kept for the backward."""

    wall: float
    cpu: float
    kept: int


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return measure(arguments.rounds, arguments.dtype)
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29713", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **places, "RANK": str(rank)})
        for rank in range(RANKS)
    ]
    sys.exit(max(rank.wait() for rank in ranks))


def measure(rounds: int, dtypes: list[str]) -> None:
    """Run all ways in turn on this rank; rank 0 writes the table."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    lines = []
    for dtype in dtypes:
        stages = {name: build(rank, dtype, *way) for name, way in WAYS.items()}
        passes: dict[str, list[Pass]] = {name: [] for name in stages}
        for turn in range(rounds + 1):
            for place in range(len(stages)):
                name = list(stages)[(place + turn) % len(stages)]
                found = one_pass(stages[name])
                if turn:
                    passes[name].append(found)
        lines += [row(name, dtype, found, passes["whole tokens"]) for name, found in passes.items()]
    if rank == 0:
        write(lines, rounds)
    dist.destroy_process_group()


def build(rank: int, dtype: str, sequence_parallel: bool, overlap: bool) -> Stage:
    """A whole model under one way."""
    group = TensorGroup(rank, RANKS, dist.group.WORLD, sequence_parallel, overlap)
    stage = Stage(MODEL, range(MODEL.num_hidden_layers), index=0, num_stages=1, group=group, rows=ROWS)
    stage.initialise(seed=1)
    return stage.to(DTYPES[dtype])


def one_pass(stage: Stage) -> Pass:
    """Run one microbatch forward and backward, both ranks at once."""
    tokens = torch.randint(0, 8192, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    stage.zero_grad()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = stage({}, microbatch=Microbatch(tokens[:, :-1], tokens[:, 1:])).losses["loss"]
    loss.backward()
    return Pass(time.perf_counter() - wall, time.process_time() - cpu, sum(kept.values()))


def row(name: str, dtype: str, passes: list[Pass], base: list[Pass]) -> str:
    """One line of the table."""
    wall = median(one.wall / other.wall for one, other in zip(passes, base, strict=True))
    cpu = median(one.cpu / other.cpu for one, other in zip(passes, base, strict=True))
    seconds = (median(one.wall for one in passes), median(one.cpu for one in passes))
    return (
        f"| {name} | {dtype} | {seconds[0] * 1e3:.0f} | {wall:.3f}x | {seconds[1] * 1e3:.0f} | {cpu:.3f}x "
        f"| {passes[0].kept / 2**20:.1f} |"
    )


def write(lines: list[str], rounds: int) -> None:
    """Write the table and print it."""
    model = f"Llama, hidden {MODEL.hidden_size}, {MODEL.num_hidden_layers} layers, {ROWS} x {LENGTH} tokens"
    text = "\n".join(
        [
            "# Collectives of the tensor axis",
            "",
            f"`python benchmarks/tensor_parallel.py --rounds {rounds}`",
            "",
            describe().markdown(),
            f"{model}, tensor {RANKS} over gloo, one thread a rank;",
            f"a forward and a backward, in turn, medians of {rounds}. *Beside*: the collectives of a layer's backward",
            "run beside its products. *Kept*: for the backward, on a rank.",
            "",
            "| | precision | ms | | CPU ms | | kept, MiB |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
        ]
    )
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
