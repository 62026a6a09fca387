"""Write a run's metrics to the console, metrics.jsonl and TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from megalite.checkpoint.save_report import SaveReport
from megalite.config.data import SPLIT_VALIDATION
from megalite.files import writing
from megalite.launch import clear_announcement
from megalite.monitoring.stragglers import WINDOW, Straggler


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step's line of metrics.jsonl.

    `tokens` counts from the start of the run. `memory_bytes` is the largest peak memory over the ranks: resident memory
    on a CPU, allocated memory on an accelerator. `data_wait` is the largest share of the step, over the ranks, that a
    rank waited for its batch.
    """

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
    other_losses: Mapping[str, float] = field(default_factory=dict)
    """The losses that a model adds to `loss`, by name; each has its own key, ``losses.NAME``."""

    def as_json(self) -> dict[str, Any]:
        """Return the values by the keys of the line."""
        values = asdict(self)
        other_losses = values.pop("other_losses")
        return values | {f"losses.{name}": loss for name, loss in other_losses.items()}


WIDTH = 100
"""The largest width of a step's line on the console, in columns."""
_WARM_UP = 2
"""The first steps, which means of time leave out."""
_FIX = "free disk space, and start the run again; `megalite status` shows from where it continues"
_NOT_ON_THE_BOARD = ("step", "tokens", "skipped")


class MetricsLog:
    """Writes a run's metrics, on one rank: a line per step to the console and metrics.jsonl, and TensorBoard."""

    def __init__(
        self,
        directory: Path,
        *,
        total_steps: int,
        world_size: int,
        after: int = 0,
        last: int | None = None,
        log_every: int = 1,
        stream: TextIO | None = None,
    ) -> None:
        """Write into a run's folder, appending to the existing metrics, which end with step `after`.

        The console shows the first step, multiples of `log_every`, skipped steps and step `last`, by default the last
        of `total_steps`; the file and TensorBoard have every step.
        """
        from torch.utils.tensorboard import SummaryWriter  # the import takes a second, and only this rank needs it

        self._total, self._world = total_steps, world_size
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._path = directory / "metrics.jsonl"
        self._file = self._path.open("ab", buffering=0)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=after + 1 if after else None)
        self._last, self._log_every = last or total_steps, log_every
        self._seconds = self._tokens = 0.0
        self._steps = 0
        self._reported_memory = 0
        self._reported_scale: float | None = None
        if stream is None:
            clear_announcement()

    def info(self, text: str) -> None:
        """Print a line on the console that is not a metric."""
        self._console.print(text, markup=False)

    def step(self, metrics: StepMetrics) -> None:
        """Record one training step."""
        record = metrics.as_json()
        self._write(record)
        for name, value in record.items():
            if name not in _NOT_ON_THE_BOARD and value is not None:
                self._add_scalar(f"train/{name}", value, metrics.step)
        self._steps += 1
        if self._steps > _WARM_UP:
            self._seconds += metrics.step_seconds
            self._tokens += metrics.tokens_per_second * metrics.step_seconds
        if self._is_shown(metrics):
            self.info(self._line(metrics))
            self._report_changes(metrics)

    def configuration(self, text: str, settings: Mapping[str, str | int | float | bool]) -> None:
        """Write a run's configuration to TensorBoard: its text, and the hyperparameters by which to compare runs."""
        from torch.utils.tensorboard.summary import hparams

        with writing(self._path.with_name("tensorboard"), _FIX):
            self._board.add_text("configuration", "".join(f"    {line}\n" for line in text.splitlines()))
            for summary in hparams(dict(settings), {"train/loss": 0.0, "valid/loss": 0.0}):
                self._board._get_file_writer().add_summary(summary)

    def throughput(self) -> str | None:
        """Return a line with the mean throughput, without the warm-up steps; None if there are no other steps."""
        if self._seconds == 0.0:
            return None
        rate = self._tokens / self._seconds
        return f"throughput: {rate:,.0f} tok/s, {rate / self._world:,.0f} tok/s/rank"

    def evaluation(self, step: int, name: str, loss: float) -> None:
        """Record one evaluation on the validation set `name`."""
        perplexity = _exp(loss)
        self._write({"step": step, "valid_set": name, "valid_loss": loss, "valid_perplexity": perplexity})
        of_split = name == SPLIT_VALIDATION
        folder = "valid" if of_split else f"valid_{name}"
        self._add_scalar(f"{folder}/loss", loss, step)
        self._add_scalar(f"{folder}/perplexity", perplexity, step)
        which = "" if of_split else f" on {name}"
        self.info(f"step {step:>{len(str(self._total))}}/{self._total} | valid loss{which} {loss:.4f}")

    def rollback(self, step: int, back: int, passed_over: int) -> None:
        """Record a rollback after `step` to step `back`, and the number of samples after `back` that are skipped."""
        # The record belongs to step back + 1: a run that resumes from a checkpoint before it has not skipped samples.
        self._write({"step": back + 1, "rolled_back_from": step, "passed_over_samples": passed_over})
        self.info(f"step {step}: back to step {back}; the {passed_over:,} samples from there are passed over")

    def checkpoint(self, report: SaveReport) -> None:
        """Record the result of a checkpoint save."""
        head = f"step {report.step:>{len(str(self._total))}}/{self._total} | checkpoint"
        if report.failure is not None:
            self._write({"step": report.step, "checkpoint_failure": report.failure})
            self.info(f"{head} NOT written: {report.failure}")
            return
        numbers = {
            "checkpoint_bytes": report.bytes,
            "checkpoint_blocked_seconds": report.blocked_seconds,
            "checkpoint_durable_seconds": report.durable_seconds,
        }
        self._write({"step": report.step, **numbers})
        for name, value in numbers.items():
            self._add_scalar(f"train/{name}", value, report.step)
        self.info(
            f"{head} {report.folder.name} | {report.bytes / 1e6:,.1f} MB | blocked {report.blocked_seconds:.2f} s"
            f" | durable after {report.durable_seconds:.2f} s"
        )
        for warning in report.warnings:
            self._write({"step": report.step, "checkpoint_warning": warning})
            self.info(f"warning: {warning}")

    def restart(self, step: int, count: int) -> None:
        """Record that the run goes on after `step`, with its ranks restarted for the `count`-th time."""
        self._write({"step": step, "restart": count})
        self.info(f"restart {count}: the run goes on after step {step}")

    def straggler(self, step: int, found: Straggler, host: str) -> None:
        """Record a straggler: a rank that takes longer than its peers."""
        numbers = {"straggler": found.rank, "own_seconds": found.seconds, "median_own_seconds": found.median}
        self._write({"step": step, **numbers})
        self.info(
            f"step {step:>{len(str(self._total))}}/{self._total} | straggler: rank {found.rank} on {host} was at work"
            f" for {found.seconds:.3g} s a step over the last {WINDOW}, {found.factor:.2f} times the median of the"
            f" {found.peers:,} ranks with its stages"
        )

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        # JSON has no infinities and no NaN.
        finite = {
            name: None if _not_finite(value) else value for name, value in {**record, "time": time.time()}.items()
        }
        line = json.dumps(finite, allow_nan=False).encode() + b"\n"
        with writing(self._path, _FIX):
            while line:  # a write to a nearly full disk may be partial
                line = line[self._file.write(line) :]

    def _add_scalar(self, name: str, value: float, step: int) -> None:
        with writing(self._path.with_name("tensorboard"), _FIX):
            self._board.add_scalar(name, value, step)

    def _is_shown(self, m: StepMetrics) -> bool:
        return m.step % self._log_every == 0 or self._steps == 1 or m.step == self._last or m.skipped

    def _line(self, m: StepMetrics) -> str:
        # The remaining time is estimated without the warm-up steps as soon as there are others.
        warm = self._steps - _WARM_UP
        mean = self._seconds / warm if warm > 0 else m.step_seconds
        rate = m.tokens_per_second
        parts = [
            f"step {m.step:>{len(str(self._total))}}/{self._total}",
            f"loss {m.loss:.4f}",
            f"lr {m.learning_rate:.2e}",
            f"grad {m.grad_norm:.3f}",
            *(["skipped"] if m.skipped else []),
            f"{rate:,.0f} tok/s" if rate < 1e6 else f"{rate / 1e6:.2f}M tok/s",
            f"MFU {m.mfu:.1%}",
            f"ETA {_clock((self._total - m.step) * mean)}",
        ]
        for dropped in ("", "MFU ", "lr ", "ETA "):  # drop parts until the line is short enough; the file has all
            parts = [part for part in parts if not dropped or not part.startswith(dropped)]
            if len(" | ".join(parts)) <= WIDTH:
                break
        return " | ".join(parts)

    def _report_changes(self, m: StepMetrics) -> None:
        """Print peak memory and loss scale on lines of their own, only when they change."""
        head = f"step {m.step:>{len(str(self._total))}}/{self._total}"
        if m.memory_bytes > 1.1 * self._reported_memory:
            self._reported_memory = m.memory_bytes
            whose = "" if self._world == 1 else ", of the rank that has most"
            self.info(f"{head} | peak memory {m.memory_bytes / 2**30:.2f} GiB{whose}")
        if m.loss_scale != self._reported_scale:
            self._reported_scale = m.loss_scale
            self.info(f"{head} | loss scale {m.loss_scale:.8g}")


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
