"""Run logger: writes configuration, metrics, plots and the final state of a run to its folder."""

import itertools
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.checkpoint import forecast
from megalite.checkpoint.retention import clean, set_aside_later
from megalite.checkpoint.save_report import SaveReport
from megalite.data.datasets import Datasets
from megalite.files import write_atomically, writing
from megalite.kernels.choice import NATIVE, Kernels
from megalite.model.structure import flops_per_token
from megalite.monitoring.device import Peak, device_peak, peak_memory
from megalite.monitoring.metrics import MetricsLog, StepMetrics
from megalite.monitoring.run_folder import DONE, STOPPED, next_earlier_folder, set_aside_earlier_run, truncate_metrics
from megalite.monitoring.run_state import RunStateWriter
from megalite.monitoring.stragglers import StragglerDetector
from megalite.parallel.json_collectives import gather_json
from megalite.parallel.mesh import Mesh
from megalite.pipeline.instructions import parse
from megalite.pipeline.schedules import SCHEDULES, all_streams
from megalite.pipeline.timeline.chrome_trace import chrome_trace
from megalite.pipeline.timeline.simulator import measured_cost, simulate
from megalite.pipeline.timeline.spans import Span, Timeline
from megalite.training.plan import Plan
from megalite.training.resume import Start
from megalite.training.step_report import StepReport
from megalite.training.stop_requests import StopRequests

_SHOWN_DOCUMENTS = 8
"""Number of documents that the line about a loss spike names."""


class RunLogger:
    """Writes the files of `run.dir` and console lines, on rank 0; all ranks call it, for its collective methods."""

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        dtype: torch.dtype,
        datasets: Datasets,
        start: Start | None = None,
        stop: StopRequests | None = None,
        kernels: Kernels = NATIVE,
        marker: RunStateWriter | None = None,
    ) -> None:
        config, start = plan.config, start or Start()
        self.config, self.mesh, self.plan = config, mesh, plan
        self.directory, self.stop, self.marker = config.run.dir, stop, marker
        self.log: MetricsLog | None = None
        self.tokens = 0
        self.valid_losses: dict[str, float] = {}
        self.picture: Path | None = None
        self.samples = datasets.train
        self.unigram_entropy = datasets.unigram_entropy
        self.flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        messages: list[str] = []
        if mesh.rank == 0:
            with writing(self.directory, "make it writable, or set another run.dir"):
                messages = self._start_directory(start)
                self.log = MetricsLog(
                    self.directory,
                    total_steps=config.train.steps,
                    world_size=plan.layout.world_size,
                    after=start.step,
                    last=config.train.last_step,
                    log_every=config.train.log_every,
                )
                self.log.configuration(config.to_yaml(), dict(_flat(config.model_dump(mode="json"))))
        self.stragglers = StragglerDetector(plan.layout, config.train.straggler_factor)
        self.hosts = gather_json(socket.gethostname(), mesh)
        self.peak = self._measure_peak(dtype)
        if self.log:
            self.log.info(
                f"{config.model.architecture} | {plan.layout} | ZeRO-{config.zero_stage} | {config.precision}"
                f" | peak {self.peak.flops / 1e12:.3g} TFLOP/s ({self.peak.source})"
            )
            if mesh.device.type == "cpu":
                self.log.info(f"kernels: {kernels.describe(dtype)}")
            for line in (
                *config.notes,
                *config.deepspeed.notes,
                *datasets.describe(),
                *start.notes,
                *messages,
                *forecast.warnings(config, plan.checkpoint_bytes),
            ):
                self.log.info(line)
            if marker is not None:
                marker.running()
            if start.step >= (config.train.stop_after or config.train.steps):
                self.log.info(f"nothing is left to train: step {start.step:,} of {config.train.steps:,} is done")

    def restarted(self, step: int, count: int) -> None:
        """Log that the ranks were restarted for the `count`-th time and resume after `step`."""
        if self.log is not None:
            self.log.restart(step, count)

    def step(self, report: StepReport) -> None:
        """Log a training step. Collective."""
        tokens = report.samples * self.config.data.sequence_length
        self.tokens = report.consumed_samples * self.config.data.sequence_length
        share = report.data_seconds / report.seconds
        compute = [
            report.compute_seconds if rank == self.mesh.rank else 0.0 for rank in range(self.plan.layout.world_size)
        ]
        mine = torch.tensor(
            [peak_memory(self.mesh.device), share, *compute], dtype=torch.float64, device=self.mesh.device
        )
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        if self.log is None:
            return
        memory, data_wait, *seconds = mine.tolist()
        rate = tokens / report.seconds
        self.log.step(
            StepMetrics(
                step=report.step,
                loss=report.loss,
                other_losses=report.other_losses,
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
        for found in self.stragglers.update(seconds):
            self.log.straggler(report.step, found, self.hosts[found.rank])

    def evaluation(self, step: int, name: str, loss: float) -> None:
        """Log an evaluation on the validation set `name`."""
        self.valid_losses[name] = loss
        if self.log is not None:
            self.log.evaluation(step, name, loss)

    def checkpoints(self, reports: Sequence[SaveReport]) -> None:
        """Log saves that have ended."""
        if self.log is not None:
            for report in reports:
                self.log.checkpoint(report)

    def spike(self, report: StepReport, samples: range) -> None:
        """Log a loss spike, and write the documents of its step to ``spikes/step_N.json``."""
        spike = report.spike
        if self.log is None or spike is None:
            return
        pieces = [(sample, piece) for sample in samples for piece in self.samples.pieces(sample)]
        record = {
            "step": report.step,
            "loss": spike.loss,
            "usual_loss": spike.baseline,
            "action": spike.rule.action,
            "pieces": [{"sample": sample, **piece.as_json()} for sample, piece in pieces],
        }
        file = _next_free(self.directory / "spikes" / f"step_{report.step}.json")
        write_atomically(file, json.dumps(record).encode() + b"\n")
        documents = dict.fromkeys(f"{piece.prefix.name} {piece.document}" for _, piece in pieces)
        shown = ", ".join(list(documents)[:_SHOWN_DOCUMENTS])
        more = f" and {len(documents) - _SHOWN_DOCUMENTS:,} more" if len(documents) > _SHOWN_DOCUMENTS else ""
        skipped = "; the update is skipped" if spike.drops_update else ""
        self.log.info(
            f"step {report.step}: loss spike: {spike.loss:.4f} is {spike.loss / spike.baseline:.2f} times the median "
            f"{spike.baseline:.4f} of the losses before{skipped}; the step read documents {shown}{more}: {file}"
        )

    def rollback(self, step: int, back: int, passed_over: int) -> None:
        """Log the rollback to step `back` after a loss spike at `step`."""
        if self.log is not None:
            self.log.rollback(step, back, passed_over)

    def timeline(self, step: int, spans: Sequence[Span]) -> None:
        """Gather the measured spans of all stages, write them as JSON, and plot them with a simulation. Collective."""
        measures = self.mesh.rank in self.plan.layout.groups("pipeline")[0]
        mine = [[s.rank, str(s.instruction), s.start, s.end] for s in spans] if measures else []
        gathered = gather_json(mine, self.mesh)
        if self.log is None:
            return
        from megalite.pipeline.timeline.plot import plot_timelines

        measured = Timeline(
            tuple(Span(rank, parse(code), start, end) for part in gathered for rank, code, start, end in part)
        )
        # Counted from the spans, since the batch size may still be ramping up.
        microbatches = 1 + max(span.instruction.microbatch for span in measured.spans)
        streams = all_streams(SCHEDULES[self.config.parallel.schedule], self.plan.placement, microbatches)
        simulated = simulate(streams, measured_cost(measured))
        timelines = {"measured": measured, "simulated with the measured times": simulated}
        file = self.directory / f"timeline_step_{step}"
        write_atomically(file.with_suffix(".json"), measured.to_json().encode() + b"\n")
        write_atomically(file.with_suffix(".trace.json"), chrome_trace(timelines).encode())
        title = f"step {step}: {self.config.parallel.schedule}, {self.plan.layout}"
        self.picture = file.with_suffix(".png")
        plot_timelines(timelines, self.picture, title)
        self.log.info(
            f"step {step}: pipeline bubble {measured.bubble_fraction:.1%} measured, "
            f"{simulated.bubble_fraction:.1%} simulated with the measured times"
        )

    def stopped(self, step: int, reason: str | None) -> None:
        """Write STOPPED.json of a run that ends after `step` on request, and remove the stop file."""
        if self.log is None:
            return
        checkpoint, folder = self._checkpoint_of(step), self.plan.checkpoints / f"step_{step}"
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"step": step, "reason": reason, "checkpoint": checkpoint, "time": now}
        write_atomically(self.directory / STOPPED, json.dumps(record).encode() + b"\n")
        if self.marker is not None:
            self.marker.ended("stopped", step=step, reason=reason, checkpoint=checkpoint)
        if self.stop is not None:
            self.stop.discard()
        kept = f"checkpoint {folder.name}" if checkpoint else "no checkpoint of it was written"
        if not self.config.checkpoint.last and not checkpoint:
            kept = "no checkpoint of it is kept: checkpoint.last is false"
        self.log.info(f"stopped after step {step:,} of {self.config.train.steps:,}, asked by {reason}; {kept}")

    def _checkpoint_of(self, step: int) -> str | None:
        folder = self.plan.checkpoints / f"step_{step}"
        return str(folder) if folder.is_dir() else None

    def finish(self, step: int, *, complete: bool, stopped: bool) -> None:
        """Plot the loss curve after `step`; write DONE.json where the run is `complete`.

        A run that is neither `complete` nor `stopped` has reached train.stop_after.
        """
        if self.log is None:
            return
        from megalite.monitoring.plots import loss_curve

        curve = self.directory / "loss.png"
        entropy = self.unigram_entropy
        loss_curve(
            self.directory / "metrics.jsonl", curve, baseline=entropy, baseline_name="unigram entropy of the corpus"
        )
        beside = "" if entropy is None else f" (unigram entropy of the corpus: {entropy:.4f})"
        for name, loss in self.valid_losses.items():
            which = "" if len(self.valid_losses) == 1 else f" on {name}"
            self.log.info(f"validation loss{which}: {loss:.4f} nats a token{beside}")
        if (throughput := self.log.throughput()) is not None:
            self.log.info(throughput)
        self.log.info(f"loss curve: {curve}")
        if self.picture is not None:
            self.log.info(f"pipeline timeline: {self.picture}")
        if complete:
            done = {"step": self.config.train.steps, "tokens": self.tokens}
            write_atomically(self.directory / DONE, json.dumps(done).encode())
        if self.marker is not None and complete:
            self.marker.ended("done", step=step, checkpoint=self._checkpoint_of(step))
        elif self.marker is not None and not stopped:
            reason = f"train.stop_after={self.config.train.stop_after}"
            self.marker.ended("stopped", step=step, reason=reason, checkpoint=self._checkpoint_of(step))
        self.log.info(f"run: {self.directory}")

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def _start_directory(self, start: Start) -> list[str]:
        """Prepare the run's folder; return lines about it for the console."""
        self.directory.mkdir(parents=True, exist_ok=True)
        messages = []
        if self.stop is not None and (request := self.stop.discard_stale_file()) is not None:
            messages.append(f"removed {request}, which was there before this start")
        if start.continues(self.plan.checkpoints):
            messages += [f"warning: {line}" for line in clean(self.plan.checkpoints)]
            for name in (DONE, STOPPED):  # they are about the end of the earlier start
                (self.directory / name).unlink(missing_ok=True)
            aside = next_earlier_folder(self.directory) / "checkpoints"
            moved, place = set_aside_later(self.plan.checkpoints, start.step, aside)
            if moved:
                messages.append(f"set aside: {', '.join(moved)}, to {place}")
            truncate_metrics(self.directory / "metrics.jsonl", start.step)
        else:
            set_aside_earlier_run(self.directory)
        write_atomically(self.directory / "config.yaml", self.config.to_yaml().encode())
        return messages

    def _measure_peak(self, dtype: torch.dtype) -> Peak:
        dist.barrier()
        flops, source = device_peak(self.mesh.device, dtype)
        total = torch.tensor(flops, dtype=torch.float64, device=self.mesh.device)
        dist.all_reduce(total)
        return Peak(float(total), source)


def _flat(node: Any, key: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """Flatten settings: yield dotted key and value; lists as JSON text, and without keys whose value is None."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, str | int | float):
        yield key, node
    elif node is not None:
        yield key, json.dumps(node, default=str)


def _next_free(file: Path) -> Path:
    """Return the first of file.json, file_2.json, ... that does not exist: after a rollback a step may spike again."""
    names = (file if number == 1 else file.with_stem(f"{file.stem}_{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
