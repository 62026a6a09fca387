"""What a run leaves in its folder: configuration, metrics, pictures, and DONE.json at the end."""

import itertools
import json
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.checkpoint import forecast
from megalite.checkpoint.retention import clean, set_aside_later
from megalite.checkpointer import SaveReport
from megalite.data.datasets import Datasets
from megalite.distributed import ProcessGrid, gather_json
from megalite.files import write_whole, writing
from megalite.metrics import MetricsLog, Peak, StepMetrics, device_peak, flops_per_token, peak_memory
from megalite.pipeline.instructions import parse
from megalite.pipeline.schedule import SCHEDULES, all_streams
from megalite.pipeline.simulate import measured_cost, simulate
from megalite.pipeline.timeline import Span, Timeline
from megalite.pipeline.trace import chrome_trace
from megalite.plan import Plan
from megalite.resume import Start
from megalite.spikes import Spike
from megalite.stopping import DONE, STOPPED, StopRequests
from megalite.stragglers import StragglerWatch
from megalite.tensor_parallel.kernels import NATIVE, Kernels
from megalite.zero import StepOutcome

RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "tensorboard",
    DONE,
    STOPPED,
    "loss.png",
    "timeline_step_*",
    "spikes",
    "checkpoints",
)
"""What a run leaves in its folder, the logs of its ranks aside."""


_SHOWN_DOCUMENTS = 8


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished training step: the mean loss of the global batch, the same on every rank, and the step's outcome."""

    step: int
    loss: float
    outcome: StepOutcome
    learning_rate: float
    samples: int
    consumed_samples: int
    """Up to this step and with it."""
    seconds: float
    own_seconds: float
    """Of these, what this rank was at work itself on forwards and backwards."""
    data_seconds: float
    """Of these, what this rank waited for its batch."""
    spike: Spike | None = None
    """What its loss is, where that is a jump."""


class RunRecorder:
    """Leaves in `run.dir` what a run leaves there. Rank 0 writes; what needs every rank is collective."""

    def __init__(
        self,
        plan: Plan,
        grid: ProcessGrid,
        dtype: torch.dtype,
        datasets: Datasets,
        start: Start | None = None,
        stop: StopRequests | None = None,
        kernels: Kernels = NATIVE,
    ) -> None:
        config, start = plan.config, start or Start()
        self.config, self.grid, self.plan = config, grid, plan
        self.directory, self.stop = config.run.dir, stop
        self.log: MetricsLog | None = None
        self.tokens = 0
        self.valid_losses: dict[str, float] = {}
        self.picture: Path | None = None
        self.samples = datasets.train
        self.unigram_entropy = datasets.unigram_entropy
        self.flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        said: list[str] = []
        if grid.rank == 0:
            with writing(self.directory, "make it writable, or set another run.dir"):
                said = self._start_directory(start)
                self.log = MetricsLog(
                    self.directory,
                    total_steps=config.train.steps,
                    world_size=plan.layout.world_size,
                    after=start.step,
                )
        self.stragglers = StragglerWatch(plan.layout, config.train.straggler_factor)
        self.hosts = gather_json(socket.gethostname(), grid)
        self.peak = self._measure_peak(dtype)
        if self.log:
            self.log.say(
                f"{config.model.architecture} | {plan.layout} | ZeRO-{config.zero_stage} | {config.precision}"
                f" | peak {self.peak.flops / 1e12:.3g} TFLOP/s ({self.peak.source})"
            )
            if grid.device.type == "cpu":
                self.log.say(f"kernels: {kernels.describe(dtype)}")
            for line in (
                *config.notes,
                *config.deepspeed.notes,
                *datasets.describe(),
                *start.notes,
                *said,
                *forecast.warnings(config, plan.checkpoint_bytes),
            ):
                self.log.say(line)
            if start.step >= (config.train.stop_after or config.train.steps):
                self.log.say(f"nothing is left to train: step {start.step:,} of {config.train.steps:,} is done")

    def restarted(self, step: int, count: int) -> None:
        """Record that the ranks were started again, the `count`-th time, and go on after `step`."""
        if self.log is not None:
            self.log.restart(step, count)

    def step(self, report: StepReport) -> None:
        """Record a training step."""
        tokens = report.samples * self.config.data.sequence_length
        self.tokens = report.consumed_samples * self.config.data.sequence_length
        share = report.data_seconds / report.seconds
        own = [report.own_seconds if rank == self.grid.rank else 0.0 for rank in range(self.plan.layout.world_size)]
        mine = torch.tensor([peak_memory(self.grid.device), share, *own], dtype=torch.float64, device=self.grid.device)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        if self.log is None:
            return
        memory, data_wait, *seconds = mine.tolist()
        rate = tokens / report.seconds
        self.log.step(
            StepMetrics(
                step=report.step,
                loss=report.loss,
                learning_rate=report.learning_rate,
                grad_norm=report.outcome.grad_norm,
                loss_scale=report.outcome.loss_scale,
                skipped=report.outcome.skipped,
                tokens=self.tokens,
                tokens_per_second=rate,
                step_seconds=report.seconds,
                mfu=rate * self.flops_per_token / self.peak.flops,
                memory_bytes=int(memory),
                data_wait=data_wait,
            )
        )
        for found in self.stragglers.count(seconds):
            self.log.straggler(report.step, found, self.hosts[found.rank])

    def evaluation(self, step: int, name: str, loss: float) -> None:
        """Record an evaluation on the validation set `name`."""
        self.valid_losses[name] = loss
        if self.log is not None:
            self.log.evaluation(step, name, loss)

    def checkpoints(self, reports: Sequence[SaveReport]) -> None:
        """Record saves that have ended."""
        if self.log is not None:
            for report in reports:
                self.log.checkpoint(report)

    def spike(self, report: StepReport, samples: range) -> None:
        """Record a jump of the loss, and the documents that its step trained on."""
        spike = report.spike
        if self.log is None or spike is None:
            return
        pieces = [(sample, piece) for sample in samples for piece in self.samples.pieces(sample)]
        record = {
            "step": report.step,
            "loss": spike.loss,
            "usual_loss": spike.usual,
            "action": spike.rule.action,
            "pieces": [{"sample": sample, **piece.as_json()} for sample, piece in pieces],
        }
        file = _next_free(self.directory / "spikes" / f"step_{report.step}.json")
        write_whole(file, json.dumps(record).encode() + b"\n")
        documents = dict.fromkeys(f"{piece.prefix.name} {piece.document}" for _, piece in pieces)
        shown = ", ".join(list(documents)[:_SHOWN_DOCUMENTS])
        more = f" and {len(documents) - _SHOWN_DOCUMENTS:,} more" if len(documents) > _SHOWN_DOCUMENTS else ""
        dropped = "; its update is dropped" if spike.drops_update else ""
        self.log.say(
            f"step {report.step}: loss {spike.loss:.4f} is {spike.loss / spike.usual:.2f} times the usual "
            f"{spike.usual:.4f}{dropped}; it read documents {shown}{more}: {file}"
        )

    def rollback(self, step: int, back: int, passed_over: int) -> None:
        """Record that the run goes on from an earlier step, after a jump of the loss at `step`."""
        if self.log is not None:
            self.log.rollback(step, back, passed_over)

    def timeline(self, step: int, spans: Sequence[Span]) -> None:
        """Gather the measured spans of all stages, keep them as JSON, and draw them beside the simulation."""
        at = self.grid.coordinate
        mine = [[s.rank, str(s.instruction), s.start, s.end] for s in spans] if at.data == at.tensor == 0 else []
        gathered = gather_json(mine, self.grid)
        if self.log is None:
            return
        from megalite.pipeline.plot import plot_timelines

        measured = Timeline(
            tuple(Span(rank, parse(code), start, end) for part in gathered for rank, code, start, end in part)
        )
        # Counted, since the batch may still be growing.
        microbatches = 1 + max(span.instruction.microbatch for span in measured.spans)
        streams = all_streams(SCHEDULES[self.config.parallel.schedule], self.plan.placement, microbatches)
        simulated = simulate(streams, measured_cost(measured))
        timelines = {"measured": measured, "simulated with the measured times": simulated}
        file = self.directory / f"timeline_step_{step}"
        write_whole(file.with_suffix(".json"), measured.to_json().encode() + b"\n")
        write_whole(file.with_suffix(".trace.json"), chrome_trace(timelines).encode())
        title = f"step {step}: {self.config.parallel.schedule}, {self.plan.layout}"
        self.picture = file.with_suffix(".png")
        plot_timelines(timelines, self.picture, title)
        self.log.say(
            f"step {step}: pipeline bubble {measured.bubble_fraction:.1%} measured, "
            f"{simulated.bubble_fraction:.1%} simulated with the measured times"
        )

    def stopped(self, step: int, reason: str | None) -> None:
        """Leave STOPPED.json of a run that ends after `step` since it was asked to, and remove the file that asked."""
        if self.log is None:
            return
        folder = self.plan.checkpoints / f"step_{step}"
        checkpoint = str(folder) if folder.is_dir() else None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"step": step, "reason": reason, "checkpoint": checkpoint, "time": now}
        write_whole(self.directory / STOPPED, json.dumps(record).encode() + b"\n")
        if self.stop is not None:
            self.stop.discard()
        kept = f"checkpoint {folder.name}" if checkpoint else "no checkpoint of it was written"
        if not self.config.checkpoint.last and not checkpoint:
            kept = "no checkpoint of it is kept: checkpoint.last is false"
        self.log.say(f"stopped after step {step:,} of {self.config.train.steps:,}, asked by {reason}; {kept}")

    def finish(self, *, complete: bool) -> None:
        """Draw the curves; leave DONE.json where the run went to its last step."""
        if self.log is None:
            return
        from megalite.plots import loss_curve

        curve = self.directory / "loss.png"
        entropy = self.unigram_entropy
        loss_curve(
            self.directory / "metrics.jsonl", curve, baseline=entropy, baseline_name="unigram entropy of the corpus"
        )
        beside = "" if entropy is None else f" (unigram entropy of the corpus: {entropy:.4f})"
        for name, loss in self.valid_losses.items():
            which = "" if len(self.valid_losses) == 1 else f" on {name}"
            self.log.say(f"validation loss{which}: {loss:.4f} nats a token{beside}")
        self.log.say(f"loss curve: {curve}")
        if self.picture is not None:
            self.log.say(f"pipeline timeline: {self.picture}")
        if complete:
            done = {"step": self.config.train.steps, "tokens": self.tokens}
            write_whole(self.directory / DONE, json.dumps(done).encode())
        self.log.say(f"run: {self.directory}")

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def _start_directory(self, start: Start) -> list[str]:
        """Make the run's folder ready; return what to say of it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        said = []
        if self.stop is not None and (request := self.stop.discard_stale()) is not None:
            said.append(f"removed {request}, which was there before this start")
        if start.continues(self.plan.checkpoints):
            said += [f"warning: {line}" for line in clean(self.plan.checkpoints)]
            for name in (DONE, STOPPED):  # which tell how the run ended before
                (self.directory / name).unlink(missing_ok=True)
            aside = next_aside(self.directory) / "checkpoints"
            moved, place = set_aside_later(self.plan.checkpoints, start.step, aside)
            if moved:
                said.append(f"set aside: {', '.join(moved)}, to {place}")
            keep_metrics_until(self.directory / "metrics.jsonl", start.step)
        else:
            set_aside_earlier_run(self.directory)
        write_whole(self.directory / "config.yaml", self.config.to_yaml().encode())
        return said

    def _measure_peak(self, dtype: torch.dtype) -> Peak:
        dist.barrier()
        flops, source = device_peak(self.grid.device, dtype)
        total = torch.tensor(flops, dtype=torch.float64, device=self.grid.device)
        dist.all_reduce(total)
        return Peak(float(total), source)


def set_aside_earlier_run(directory: Path) -> None:
    """Move what an earlier run left in its folder to ``earlier/1``, or the next number: nothing is written over."""
    left = [path for name in RUN_FILES for path in sorted(directory.glob(name))]
    if not left:
        return
    aside = next_aside(directory)
    aside.mkdir(parents=True)
    for path in left:
        path.rename(aside / path.name)


def _next_free(file: Path) -> Path:
    """The first of file.json, file_2.json, file_3.json that is not there: after a rollback a step may jump again."""
    names = (file if number == 1 else file.with_stem(f"{file.stem}_{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def next_aside(directory: Path) -> Path:
    """Return the folder below ``earlier`` that comes next."""
    numbers = [int(path.name) for path in (directory / "earlier").glob("*") if path.name.isdigit()]
    return directory / "earlier" / str(max(numbers, default=0) + 1)


def keep_metrics_until(path: Path, step: int) -> None:
    """Take out of a run's metrics what comes after `step`, and a last line that a crash tore."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with suppress(json.JSONDecodeError, KeyError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_whole(path, b"".join(kept))
