"""What a run says of itself: the console's line, metrics.jsonl and TensorBoard; throughput, MFU and memory."""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from megalite.checkpointer import SaveReport
from megalite.config import ModelConfig
from megalite.config.data import SPLIT_VALIDATION
from megalite.files import writing
from megalite.stragglers import WINDOW, Straggler
from megalite.tensor_parallel.kernels import Kernels, faster_products

# Dense bf16/fp16 matrix products of one device, FLOP/s, from the vendors' data sheets.
ACCELERATOR_PEAKS: Mapping[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
}


@dataclass(frozen=True, slots=True)
class Peak:
    """The rate of matrix products that MFU is a share of, FLOP/s over all ranks, and where the number is from."""

    flops: float
    source: str


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One line of metrics.jsonl. `tokens` counts from the start of the run, `memory_bytes` is the peak of the rank
    that has most: resident memory on a CPU, allocated memory on an accelerator. `data_wait` is the share of the step
    that the rank which waited longest for its batch did so."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    loss_scale: float | None
    skipped: bool
    tokens: int
    tokens_per_second: float
    step_seconds: float
    mfu: float
    memory_bytes: int
    data_wait: float


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of one token's forward and backward: 6 a weight that multiplies, and attention.

    Attention counts 12 * layers * width * sequence, the whole square, as the literature does (arXiv:2204.02311,
    appendix B); the causal half that kernels skip is not taken off.
    """
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    kv_width = (config.num_key_value_heads or config.num_attention_heads) * head_dim
    matrices_of_mlp = 3 if config.architecture == "llama" else 2
    assert config.vocab_size is not None
    assert config.intermediate_size is not None
    attention = config.hidden_size * (2 * width + 2 * kv_width)
    mlp = matrices_of_mlp * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * (attention + mlp) + config.vocab_size * config.hidden_size
    return 6.0 * weights + 12.0 * config.num_hidden_layers * width * sequence_length


def device_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return this device's matrix-product peak in FLOP/s and its source: the data sheet's, or measured right here.

    Measured in the run's precision, by the ranks at the same time: that is what the ranks of one machine have.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, peak in ACCELERATOR_PEAKS.items():
            if all(word in name for word in part.split()):
                return peak, f"data sheet of {part}"
    kernels = Kernels(faster_products(device, dtype))
    source = "measured matrix products" + (", in fp32" if kernels.products == "fp32" else "")
    return matrix_rate(device, dtype, kernels), source


def wait_for(device: torch.device) -> None:
    """Return once an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype, kernels: Kernels, seconds: float = 0.25) -> float:
    """Return the best rate of a matrix product on this device in so many seconds, in FLOP/s.

    A product that alone takes longer is measured once, after a smaller one.
    """
    size = 768 if device.type == "cpu" else 8192
    small, a, b = (torch.randn(n, n, device=device).to(dtype) for n in (size // 8, size, size))
    kernels.matmul(small, small)
    wait_for(device)
    best, began = 0.0, time.perf_counter()
    while best == 0.0 or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        kernels.matmul(a, b)
        wait_for(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_FIX = "make room, and start the run again: it goes on from its newest checkpoint"
_ON_THE_BOARD = tuple(field.name for field in fields(StepMetrics) if field.name not in ("step", "tokens", "skipped"))


class MetricsLog:
    """Writes a run's metrics, on one rank: a line a step to the console and to metrics.jsonl, and TensorBoard."""

    def __init__(
        self, directory: Path, *, total_steps: int, world_size: int, after: int = 0, stream: TextIO | None = None
    ) -> None:
        """Write into a run's folder, adding to the metrics up to step `after` that are there."""
        from torch.utils.tensorboard import SummaryWriter  # a second of import that only this rank needs

        self._total, self._world = total_steps, world_size
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._path = directory / "metrics.jsonl"
        self._file = self._path.open("ab", buffering=0)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=after + 1 if after else None)
        self._seconds = 0.0
        self._steps = 0

    def say(self, text: str) -> None:
        """Print one line that is no metric."""
        self._console.print(text, markup=False)

    def step(self, metrics: StepMetrics) -> None:
        """Record one training step."""
        self._write(asdict(metrics))
        for name in _ON_THE_BOARD:
            value = getattr(metrics, name)
            if value is not None:
                self._add_scalar(f"train/{name}", value, metrics.step)
        self.say(self._line(metrics))

    def evaluation(self, step: int, name: str, loss: float) -> None:
        """Record one evaluation on the validation set `name`."""
        self._write({"step": step, "valid_set": name, "valid_loss": loss})
        of_split = name == SPLIT_VALIDATION
        self._add_scalar("valid/loss" if of_split else f"valid_{name}/loss", loss, step)
        which = "" if of_split else f" on {name}"
        self.say(f"step {step:>{len(str(self._total))}}/{self._total} | valid loss{which} {loss:.4f}")

    def rollback(self, step: int, back: int, passed_over: int) -> None:
        """Record that after `step` the run goes on from step `back`, with so many samples passed over from there."""
        # It is of the first step after it: a run that resumes from before has not passed anything over.
        self._write({"step": back + 1, "rolled_back_from": step, "passed_over_samples": passed_over})
        self.say(f"step {step}: back to step {back}; the {passed_over:,} samples from there are passed over")

    def checkpoint(self, report: SaveReport) -> None:
        """Record one checkpoint, or that there is none."""
        head = f"step {report.step:>{len(str(self._total))}}/{self._total} | checkpoint"
        if report.failure is not None:
            self._write({"step": report.step, "checkpoint_failure": report.failure})
            self.say(f"{head} NOT written: {report.failure}")
            return
        numbers = {
            "checkpoint_bytes": report.bytes,
            "checkpoint_blocked_seconds": report.blocked_seconds,
            "checkpoint_durable_seconds": report.durable_seconds,
        }
        self._write({"step": report.step, **numbers})
        for name, value in numbers.items():
            self._add_scalar(f"train/{name}", value, report.step)
        self.say(
            f"{head} {report.folder.name} | {report.bytes / 1e6:,.1f} MB | blocked {report.blocked_seconds:.2f} s"
            f" | durable after {report.durable_seconds:.2f} s"
        )
        for warning in report.warnings:
            self._write({"step": report.step, "checkpoint_warning": warning})
            self.say(f"warning: {warning}")

    def restart(self, step: int, count: int) -> None:
        """Record that the run goes on after `step` since its ranks were started again, the `count`-th time."""
        self._write({"step": step, "restart": count})
        self.say(f"restart {count}: the run goes on after step {step}")

    def straggler(self, step: int, found: Straggler, host: str) -> None:
        """Record that a rank takes longer than its peers."""
        numbers = {"straggler": found.rank, "own_seconds": found.seconds, "median_own_seconds": found.median}
        self._write({"step": step, **numbers})
        self.say(
            f"step {step:>{len(str(self._total))}}/{self._total} | straggler: rank {found.rank} on {host} was at work"
            f" for {found.seconds:.3g} s a step over the last {WINDOW}, {found.factor:.2f} times the median of the"
            f" {found.peers:,} ranks with its stages"
        )

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        # JSON has no word for what is not finite.
        finite = {name: None if _not_finite(value) else value for name, value in record.items()}
        line = json.dumps(finite, allow_nan=False).encode() + b"\n"
        with writing(self._path, _FIX):
            while line:  # a disk that is nearly full takes a part
                line = line[self._file.write(line) :]

    def _add_scalar(self, name: str, value: float, step: int) -> None:
        with writing(self._path.with_name("tensorboard"), _FIX):
            self._board.add_scalar(name, value, step)

    def _line(self, m: StepMetrics) -> str:
        # The first steps warm caches up; the remaining time is told from the others as soon as there are some.
        self._steps += 1
        if self._steps > 2:
            self._seconds += m.step_seconds
        mean = self._seconds / (self._steps - 2) if self._steps > 2 else m.step_seconds
        remaining = _clock((self._total - m.step) * mean)
        scale = f" | scale {m.loss_scale:.8g}" if m.loss_scale is not None else ""
        return (
            f"step {m.step:>{len(str(self._total))}}/{self._total} | loss {m.loss:.4f} | lr {m.learning_rate:.2e}"
            f" | grad {m.grad_norm:.3f}{scale}{' | skipped' if m.skipped else ''}"
            f" | tok/s {m.tokens_per_second:,.0f} | tok/s/rank {m.tokens_per_second / self._world:,.0f}"
            f" | MFU {m.mfu:.1%} | mem {m.memory_bytes / 2**30:.2f} GiB | ETA {remaining}"
        )


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
