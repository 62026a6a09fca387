"""Run logger: writes the metrics of a run, its console lines, and the documents of loss spikes."""

import itertools
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.checkpoint import forecast
from megalite.checkpoint.discovery import CHECKPOINTS
from megalite.checkpoint.save_report import SaveReport
from megalite.files import write_atomically, writing
from megalite.model.structure import flops_per_token
from megalite.monitoring.callback import Callback, RunEnd, RunStart
from megalite.monitoring.device import Peak, device_peak, peak_memory
from megalite.monitoring.metrics import MetricsLog, StepMetrics
from megalite.monitoring.step_report import Spike, StepReport
from megalite.monitoring.stragglers import StragglerDetector
from megalite.parallel.json_collectives import gather_json

_SHOWN_DOCUMENTS = 8
"""Number of documents that the line about a loss spike names."""


class RunLogger(Callback):
    """Writes metrics and console lines, on rank 0; all ranks call it, for its collectives."""

    def __init__(self, notes: Sequence[str], checkpoint_bytes: int) -> None:
        """`notes` are lines about the start for the console; a checkpoint takes `checkpoint_bytes`."""
        self._notes, self._checkpoint_bytes = notes, checkpoint_bytes
        self._log: MetricsLog | None = None
        self._valid_losses: dict[str, float] = {}

    def info(self, text: str) -> None:
        """Print a line on the console, on rank 0."""
        if self._log is not None:
            self._log.info(text)

    def on_start(self, start: RunStart) -> None:
        config, mesh = start.config, start.mesh
        self._start, self._config, self._mesh = start, config, mesh
        self._flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        dtype = next(iter(start.stages.values())).activation_dtype
        if mesh.rank == 0:
            with writing(config.run.dir, "make it writable, or set another run.dir"):
                self._log = MetricsLog(
                    config.run.dir,
                    total_steps=config.train.steps,
                    world_size=mesh.layout.world_size,
                    after=start.step,
                    last=config.train.last_step,
                    log_every=config.train.log_every,
                )
                self._log.configuration(config.to_yaml(), dict(_flat(config.model_dump(mode="json"))))
        self._stragglers = StragglerDetector(mesh.layout, config.train.straggler_factor)
        self._hosts = gather_json(socket.gethostname(), mesh)
        self._peak = self._measure_peak(dtype)
        for line in self._first_lines(dtype):
            self.info(line)
        if self._log is not None and start.restarts:
            self._log.restart(start.step, start.restarts)

    def _first_lines(self, dtype: torch.dtype) -> Iterator[str]:
        config, start = self._config, self._start
        yield (
            f"{config.model.architecture} | {self._mesh.layout} | {config.sharding} | {config.precision}"
            f" | peak {self._peak.flops / 1e12:.3g} TFLOP/s ({self._peak.source})"
        )
        if self._mesh.device.type == "cpu":
            yield f"kernels: {start.kernels.describe(dtype)}"
        yield from (*config.notes, *config.deepspeed.notes, *start.datasets.describe(), *self._notes)
        yield from forecast.warnings(config, self._checkpoint_bytes)
        if start.step >= config.train.last_step:
            yield f"nothing is left to train: step {start.step:,} of {config.train.steps:,} is done"

    def after_step(self, report: StepReport) -> None:
        """Log a step, and the documents of a loss spike. Collective."""
        world_size, device = self._mesh.layout.world_size, self._mesh.device
        compute = [report.compute_seconds if rank == self._mesh.rank else 0.0 for rank in range(world_size)]
        mine = [peak_memory(device), report.data_seconds / report.seconds, *compute]
        largest = torch.tensor(mine, dtype=torch.float64, device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if self._log is None:
            return
        memory, data_wait, *seconds = largest.tolist()
        length = self._config.data.sequence_length
        rate = len(report.samples) * length / report.seconds
        self._log.step(
            StepMetrics(
                step=report.step,
                loss=report.loss,
                other_losses=report.other_losses,
                learning_rate=report.learning_rate,
                grad_norm=report.outcome.grad_norm,
                loss_scale=report.outcome.loss_scale,
                skipped=report.outcome.skipped,
                tokens=report.consumed_samples * length,
                tokens_per_second=rate,
                step_seconds=report.seconds,
                mfu=rate * self._flops_per_token / self._peak.flops,
                memory_bytes=int(memory),
                data_wait=data_wait,
            )
        )
        for found in self._stragglers.update(seconds):
            self._log.straggler(report.step, found, self._hosts[found.rank])
        if report.spike is not None:
            self._log.info(self._record_spike(report, report.spike))

    def on_rollback(self, step: int, back: int, skipped_samples: int) -> None:
        if self._log is not None:
            self._log.rollback(step, back, skipped_samples)

    def on_evaluate(self, step: int, name: str, loss: float) -> None:
        self._valid_losses[name] = loss
        if self._log is not None:
            self._log.evaluation(step, name, loss)

    def on_checkpoint(self, report: SaveReport) -> None:
        if self._log is not None:
            self._log.checkpoint(report)

    def on_end(self, end: RunEnd) -> None:
        """Log the end of the run, and plot the loss curve."""
        if self._log is None:
            return
        from megalite.monitoring.plots import loss_curve

        if end.stopped_by is not None:
            self._log.info(self._line_about_stop(end))
        directory, entropy = self._config.run.dir, self._start.datasets.unigram_entropy
        curve = directory / "loss.png"
        loss_curve(directory / "metrics.jsonl", curve, baseline=entropy, baseline_name="unigram entropy of the corpus")
        beside = "" if entropy is None else f" (unigram entropy of the corpus: {entropy:.4f})"
        for name, loss in self._valid_losses.items():
            which = "" if len(self._valid_losses) == 1 else f" on {name}"
            self._log.info(f"validation loss{which}: {loss:.4f} nats a token{beside}")
        if (throughput := self._log.throughput()) is not None:
            self._log.info(throughput)
        self._log.info(f"loss curve: {curve}")

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _line_about_stop(self, end: RunEnd) -> str:
        config, name = self._config, f"step_{end.step}"
        kept = "no checkpoint of it was written"
        if (config.run.dir / CHECKPOINTS / name).is_dir():
            kept = f"checkpoint {name}"
        elif not config.checkpoint.last:
            kept = "no checkpoint of it is kept: checkpoint.last is false"
        return f"stopped after step {end.step:,} of {config.train.steps:,}, asked by {end.stopped_by}; {kept}"

    def _record_spike(self, report: StepReport, spike: Spike) -> str:
        """Write the documents of a step with a loss spike to ``spikes/step_N.json``; return the line about it."""
        samples = self._start.datasets.train
        pieces = [(sample, piece) for sample in report.samples for piece in samples.pieces(sample)]
        record = {
            "step": report.step,
            "loss": spike.loss,
            "usual_loss": spike.baseline,
            "action": spike.rule.action,
            "pieces": [{"sample": sample, **piece.as_json()} for sample, piece in pieces],
        }
        file = _next_free(self._config.run.dir / "spikes" / f"step_{report.step}.json")
        write_atomically(file, json.dumps(record).encode() + b"\n")
        documents = dict.fromkeys(f"{piece.prefix.name} {piece.document}" for _, piece in pieces)
        shown = ", ".join(list(documents)[:_SHOWN_DOCUMENTS])
        more = f" and {len(documents) - _SHOWN_DOCUMENTS:,} more" if len(documents) > _SHOWN_DOCUMENTS else ""
        skipped = "; the update is skipped" if spike.drops_update else ""
        return (
            f"step {report.step}: loss spike: {spike.loss:.4f} is {spike.loss / spike.baseline:.2f} times the median "
            f"{spike.baseline:.4f} of the losses before{skipped}; the step read documents {shown}{more}: {file}"
        )

    def _measure_peak(self, dtype: torch.dtype) -> Peak:
        dist.barrier()
        flops, source = device_peak(self._mesh.device, dtype)
        total = torch.tensor(flops, dtype=torch.float64, device=self._mesh.device)
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
