"""CPU seconds a step of the AdamW implementations that a run on CPU can choose from.

    python benchmarks/adamw.py                       # torch's and DeepSpeed's; the first run builds DeepSpeed's two
    python benchmarks/adamw.py --no-deepspeed        # torch's alone, nothing is built

Every implementation takes the same gradients, one step each in turn, on one flat fp32 tensor (how ZeRO keeps its master
weights) and on the list of tensors of the benchmark's model; the weights are compared with AdamW in float64
(arXiv:1711.05101). A process of its own for every number of threads: DeepSpeed's kernels bring an OpenMP runtime that
listens to OMP_NUM_THREADS alone.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from machine import Machine, describe
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
EXTENSIONS = Path(tempfile.gettempdir()) / "megalite-extensions"
LR, BETAS, EPS, WEIGHT_DECAY = 3e-4, (0.9, 0.95), 1e-8, 0.1
TORCH = ("torch AdamW(foreach=True)", "torch AdamW(fused=True)")
DEEPSPEED = ("DeepSpeed FusedAdam", "DeepSpeedCPUAdam")


@dataclass(frozen=True, slots=True)
class Result:
    """One implementation on one shape of parameters; medians over the steps, seconds."""

    name: str
    shape: str
    threads: int
    elements: int
    cpu_seconds: float
    wall_seconds: float
    worst_error: float

    @property
    def nanoseconds_per_element(self) -> float:
        """CPU time of one element's update."""
        return self.cpu_seconds / self.elements * 1e9


def make_optimizer(name: str, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Build the implementation called `name`, all with the same constants."""
    constants = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    if name == "torch AdamW(foreach=True)":
        return torch.optim.AdamW(parameters, foreach=True, **constants)
    if name == "torch AdamW(fused=True)":
        return torch.optim.AdamW(parameters, fused=True, **constants)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if name == "DeepSpeed FusedAdam":
        return FusedAdam(parameters, adam_w_mode=True, **constants)
    return DeepSpeedCPUAdam(parameters, adamw_mode=True, fp32_optimizer_states=True, **constants)


def shapes(elements: int) -> dict[str, list[tuple[int, ...]]]:
    """The two sets of parameters: one flat tensor, and the 75 of the model that train_step.py trains."""
    hidden, intermediate, vocabulary = 512, 1408, 8192
    layer = [(hidden,), *4 * [(hidden, hidden)], (hidden,), *2 * [(intermediate, hidden)], (hidden, intermediate)]
    model: list[tuple[int, ...]] = [(vocabulary, hidden), *8 * layer, (hidden,), (vocabulary, hidden)]
    return {"one flat tensor": [(elements,)], f"{len(model)} tensors": model}


def measure(names: Sequence[str], shape: str, sizes: Sequence[tuple[int, ...]], steps: int) -> list[Result]:
    """Step every implementation in turn, `steps` times after two to warm up, over the same stream of gradients."""
    generator = torch.Generator().manual_seed(1234)
    start = [torch.randn(size, generator=generator) * 0.02 for size in sizes]
    copies = {name: [torch.nn.Parameter(weight.clone()) for weight in start] for name in names}
    optimizers = {name: make_optimizer(name, copies[name]) for name in names}
    reference = Float64AdamW(start)
    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    for step in range(steps + 2):
        grads = [torch.randn(size, generator=generator) * 1e-3 for size in sizes]
        reference.step(grads)
        for name in names:
            for parameter, grad in zip(copies[name], grads, strict=True):
                parameter.grad = grad
            wall_seconds, cpu_seconds = timed(optimizers[name].step)
            if step >= 2:
                wall[name].append(wall_seconds)
                cpu[name].append(cpu_seconds)
    elements, threads = sum(weight.numel() for weight in start), torch.get_num_threads()
    return [
        Result(name, shape, threads, elements, median(cpu[name]), median(wall[name]), reference.error(copies[name]))
        for name in names
    ]


class Float64AdamW:
    """AdamW as the paper writes it, in float64, on a slice of each tensor: the measure of *right*."""

    def __init__(self, weights: Sequence[torch.Tensor], kept: int = 4099) -> None:
        self.kept = kept
        self.weights = [self._slice(weight) for weight in weights]
        self.first = [torch.zeros_like(weight) for weight in self.weights]
        self.second = [torch.zeros_like(weight) for weight in self.weights]
        self.steps = 0

    def _slice(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().reshape(-1)[-self.kept :].double()

    def step(self, grads: Sequence[torch.Tensor]) -> None:
        """One update of every slice."""
        self.steps += 1
        correction1, correction2 = (1 - beta**self.steps for beta in BETAS)
        for weight, first, second, grad in zip(self.weights, self.first, self.second, grads, strict=True):
            g = self._slice(grad)
            first.lerp_(g, 1 - BETAS[0])
            second.lerp_(g * g, 1 - BETAS[1])
            weight.mul_(1 - LR * WEIGHT_DECAY)
            weight.sub_(LR * (first / correction1) / ((second / correction2).sqrt() + EPS))

    def error(self, weights: Sequence[torch.Tensor]) -> float:
        """The largest absolute difference, in units of the learning rate times the steps (the longest way to go)."""
        pairs = zip(self.weights, weights, strict=True)
        worst = max(float((want - self._slice(have)).abs().max()) for want, have in pairs)
        return worst / (LR * self.steps)


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call, over all threads of the process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    begin = time.perf_counter()
    action()
    wall = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF)
    return wall, after.ru_utime - usage.ru_utime + after.ru_stime - usage.ru_stime


def run_worker(threads: int, arguments: argparse.Namespace, extensions: Path) -> list[Result]:
    """Measure in a fresh process that has `threads` threads in both OpenMP runtimes."""
    command = [sys.executable, __file__, "--worker", "--steps", str(arguments.steps)]
    command += ["--elements", str(arguments.elements), *(["--no-deepspeed"] if arguments.no_deepspeed else [])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return [Result(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def worker(arguments: argparse.Namespace) -> None:
    """Measure, and leave one line of JSON as the last of stdout."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    names = TORCH if arguments.no_deepspeed else TORCH + DEEPSPEED
    rows: list[Result] = []
    for shape, sizes in shapes(arguments.elements).items():
        rows += measure(names, shape, sizes, arguments.steps)
    print(json.dumps([asdict(row) for row in rows]))


COLUMNS = ("implementation", "parameters", "threads", "CPU ms", "wall ms", "CPU ns/element", "ratio", "error")


def cells(result: Result, results: Sequence[Result]) -> tuple[str, ...]:
    """One row of the table; the ratio is to the cheapest of the same shape and threads."""
    rivals = [row for row in results if (row.shape, row.threads) == (result.shape, result.threads)]
    ratio = result.cpu_seconds / min(row.cpu_seconds for row in rivals)
    return (
        result.name,
        f"{result.shape}, {result.elements / 1e6:.1f}M",
        str(result.threads),
        f"{result.cpu_seconds * 1e3:.0f}",
        f"{result.wall_seconds * 1e3:.0f}",
        f"{result.nanoseconds_per_element:.2f}",
        f"{ratio:.2f}",
        f"{result.worst_error:.1e}",
    )


def markdown(results: Sequence[Result], machine: Machine, command: str, steps: int) -> str:
    """The whole page of results."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(cells(result, results) for result in results)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"# AdamW on CPU\n\n`{command}`\n\n{machine.markdown()}\n{table}\n\n"
        f"Medians of {steps} steps after two to warm up, the implementations one step each in turn. *CPU* is user and "
        "system time over all threads; *ratio* is CPU time against the cheapest of the same parameters and threads; "
        "*error* is the largest difference from AdamW in float64, in units of learning rate times steps.\n"
    )


def main() -> None:
    """Measure at one thread and at all, print a table, write results/adamw.md and adamw.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--elements", type=int, default=27_000_000, help="size of the flat tensor")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--no-deepspeed", action="store_true", help="build nothing, measure torch's own alone")
    parser.add_argument("--extensions", type=Path, default=EXTENSIONS, help="where builds are kept")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    machine = describe()
    results = [row for threads in arguments.threads for row in run_worker(threads, arguments, arguments.extensions)]
    table = Table(*COLUMNS, title="AdamW on CPU")
    for result in results:
        table.add_row(*cells(result, results))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    RESULTS.mkdir(exist_ok=True)
    command = f"python benchmarks/adamw.py --steps {arguments.steps} --elements {arguments.elements}"
    (RESULTS / "adamw.md").write_text(markdown(results, machine, command, arguments.steps))
    record = {"command": command, "machine": machine.as_dict(), "results": [asdict(row) for row in results]}
    (RESULTS / "adamw.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
