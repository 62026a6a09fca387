"""The training loop of one rank, with evaluation, checkpoints and loss spike rollback."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist

from megalite.config import RunConfig
from megalite.config.sections import SpikeSection
from megalite.data.batch_schedule import SkippedSamples
from megalite.data.collate import SampleMicrobatch, SampleRules
from megalite.data.datasets import Datasets
from megalite.data.prefetch import Prefetcher
from megalite.errors import UserError
from megalite.kernels.choice import Kernels
from megalite.model.kernel_choice import choose_kernels
from megalite.model.loss import LOSS
from megalite.model.precision import DTYPES
from megalite.monitoring.callback import Callback, Callbacks, RunEnd, RunStart
from megalite.monitoring.heartbeat import Progress
from megalite.monitoring.run_state import RunStateWriter
from megalite.monitoring.step_report import StepReport
from megalite.optim.learning_rate import learning_rate
from megalite.parallel.json_collectives import on_rank_zero
from megalite.parallel.mesh import Mesh
from megalite.pipeline.instructions import Instruction
from megalite.pipeline.schedules import SCHEDULES
from megalite.planning.plan import Plan
from megalite.training.build import build_engine, build_executor
from megalite.training.checkpointing import Checkpointer
from megalite.training.evaluation import Evaluator, reduce_losses
from megalite.training.loss_spikes import LossSpikeDetector
from megalite.training.microbatches import MicrobatchLoader
from megalite.training.named_losses import NamedLosses
from megalite.training.nonfinite import NonFiniteGuard
from megalite.training.observers import all_callbacks, own_callbacks
from megalite.training.resume import find_start
from megalite.training.stop_requests import StopRequests


class Trainer:
    """The trainer of one rank, with its stages, engine, executor and data. All methods are collective."""

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        datasets: Datasets,
        *,
        stop: StopRequests | None = None,
        progress: Progress | None = None,
        restarts: int = 0,
        marker: RunStateWriter | None = None,
        callbacks: Sequence[Callback] = (),
        on_save_point: Callable[[str], None] = lambda point: None,
    ) -> None:
        """Build the parts of this rank; `on_save_point` is called as `Checkpointer` describes.

        `stop` holds the stop requests, `progress` receives the current phase and step, `restarts` is the number of
        restarts of the ranks, and on rank 0 `marker` records that training runs and how it ended. `callbacks` observe
        `run`, after megalite's own and those of ``train.callbacks``.
        """
        self.plan, self.config, self.mesh, self.datasets = plan, plan.config, mesh, datasets
        self.stop, self.progress, self.restarts = stop or StopRequests(), progress or Progress(), restarts
        self._marker, self._given_callbacks = marker, callbacks
        self.callbacks = Callbacks(())
        """The callbacks of `run`; none before."""
        self.start = find_start(plan, mesh)
        self.kernels = _choose_kernels_on_rank_zero(self.config, mesh, self.start.kernels)
        self.engine = build_engine(plan, mesh, self.start, self.kernels)
        self.state = self.engine.state
        _ = plan.documents  # read now, since the folder of `init_from` may be gone at the first save
        self.spike_detector = LossSpikeDetector(self.config.train.spike, self.start.recent_losses)
        self.rollbacks = 0
        self.nonfinite_guard = NonFiniteGuard(self.config.train.max_bad_steps, self.engine, mesh, self.config.run.dir)
        self.checkpointer = Checkpointer(
            self.config.checkpoint,
            plan.checkpoints,
            self.state,
            mesh,
            tensor_bytes=plan.checkpoint_bytes,
            files=plan.model_files() if mesh.rank == 0 else {},
            on_save_point=on_save_point,
            on_progress=self.progress.touch,
        )
        self.engine.on_update_progress(self.progress.touch)
        self.executor = build_executor(self.engine, plan, mesh, on_progress=self.progress.touch)
        self.train_losses = NamedLosses(mesh)
        self.schedule = self.start.batches(self.config.train)
        rules = SampleRules.of(self.config, datasets.fim)
        self.loader = MicrobatchLoader(datasets.train, rules, self.config, mesh, trains=True)
        self.batches = self._prefetch()
        self.evaluator = Evaluator(self.executor, self.config, datasets, mesh, self.stop)

    def run(self) -> bool:
        """Train to the last step, or to `train.stop_after`, with evaluations and checkpoints, observed by callbacks.

        Returns whether a stop request ended the training before that step; then a checkpoint was saved, unless the
        configuration has none.
        """
        last, step, stopped = self.config.train.last_step, self.start.step, False
        own = own_callbacks(self.plan, self.mesh, self.start, self.stop, self.progress, self._marker)
        self.callbacks = all_callbacks(own, self.config.train.callbacks, self._given_callbacks)
        with closing(self.callbacks), self._settle_on_error():
            self.callbacks.on_start(self._run_start())
            while step < last and not stopped:
                step += 1
                report = self.step(step)
                self.callbacks.after_step(report)
                if (back := self._roll_back_after(report)) is not None:
                    step, stopped = back, self.stop.agreed is not None
                    continue
                skipped = report.outcome.skipped and report.spike is None
                self.nonfinite_guard.update(step, skipped=skipped, loss_scale=report.outcome.loss_scale)
                if self._evaluates_after(step):
                    self._evaluate(step)
                stopped = self.stop.agreed is not None and step < last
                if self.checkpointer.due(step, last=step if stopped else last):
                    self.save(step)
                self._report_saves()
            self.checkpointer.wait()
            self._report_saves()
            self.callbacks.on_end(self._run_end(step, stopped))
        return stopped

    def step(self, step: int, *, before_update: Callable[[], None] = lambda: None) -> StepReport:
        """Run training step number `step`, counted from 1, and return its report.

        `before_update` is called after the gradients were reduced, before they are clipped and applied.
        """
        started = time.perf_counter()
        self.callbacks.before_step(step)
        self.callbacks.on_phase("data", step)
        batch = self.batches.take(step)
        self.callbacks.on_phase("compute", step)
        self.executor.compute_timer.take()  # drop the time of an evaluation
        record = step in self.config.train.trace_steps
        with self.engine.accumulate():
            with self.nonfinite_guard.watching():
                microbatches = self.loader.microbatches(batch, self.loader.num_loss_tokens(batch))
                if record:
                    dist.barrier()  # a common start time of the timeline on all ranks
                result = self.executor.run(self._train_stream(len(batch)), microbatches, record=record)
            losses = reduce_losses(result, self.train_losses, self.stop)
            loss = losses.pop(LOSS)
            spike = self.spike_detector.update(loss)
            if drops := spike is not None and spike.drops_update:
                self.engine.poison_gradients()
        scheduled_rate = self._learning_rate(step)
        # DeepSpeed's scheduler sets the next step's rate within the step, so the rate is read before.
        rate = self.engine.learning_rate if scheduled_rate is None else scheduled_rate
        self.callbacks.on_phase("update", step)
        self.checkpointer.before_update()
        before_update()
        with self.state.preserve_loss_scale() if drops else nullcontext():
            outcome = self.engine.step(scheduled_rate)
        return StepReport(
            step=step,
            loss=loss,
            other_losses=losses,
            outcome=outcome,
            learning_rate=rate,
            samples=self.schedule.samples(step),
            consumed_samples=self.schedule.consumed(step),
            seconds=time.perf_counter() - started,
            compute_seconds=self.executor.compute_timer.take(),
            data_seconds=self.batches.waited,
            spike=spike,
            spans=result.spans,
        )

    def evaluate(self, name: str) -> float:
        """Return the mean loss over a validation set, as `Evaluator.evaluate` does."""
        return self.evaluator.evaluate(name)

    def save(self, step: int) -> None:
        """Save a checkpoint of the state after `step`; raise UserError where that fails."""
        self.callbacks.on_phase("save", step)
        self.checkpointer.save(self.plan.manifest(step), self._progress(step))

    def roll_back(self, step: int, rule: SpikeSection) -> int | None:
        """Roll back to the newest intact checkpoint and skip the samples from there to the end of `step`.

        Returns the step of the checkpoint, None where there is no checkpoint yet. Raises UserError after
        `train.spike.max_rollbacks` rollbacks.
        """
        self.checkpointer.wait()
        self.callbacks.on_phase("start", step)  # a checkpoint is read as at a start, which may take long
        start = find_start(replace(self.plan, config=self.config.model_copy(update={"resume": "auto"})), self.mesh)
        if start.reader is None:
            return None
        if self.rollbacks == rule.max_rollbacks:
            raise UserError(
                f"the run rolled back train.spike.max_rollbacks={rule.max_rollbacks} times, and step {step} has "
                "another loss spike; lower train.optimizer.lr or gradient_clipping, or resume with "
                "train.spike.action=skip"
            )
        self.rollbacks += 1
        begin = start.batches(self.config.train).position(start.step)
        gap = SkippedSamples(start.step, self.schedule.position(step) - begin)
        self.schedule = replace(start, passed_over=(*start.passed_over, gap)).batches(self.config.train)
        self.spike_detector = LossSpikeDetector(rule, start.recent_losses)
        self.state.restore(start.reader, start.reader.state["optimizer"])
        self.engine.sync_model_params_from_master()
        self.batches.close()
        self.batches = self._prefetch()
        return start.step

    def close(self) -> None:
        self.batches.close()
        self.checkpointer.close()
        self.engine.close()

    def _run_start(self) -> RunStart:
        stages = self.engine.stages
        return RunStart(
            self.config, self.mesh, stages, self.datasets, self.start.step, self.restarts, kernels=self.kernels
        )

    def _run_end(self, step: int, stopped: bool) -> RunEnd:
        complete = not stopped and step == self.config.train.steps
        tokens = self.schedule.consumed(step) * self.config.data.sequence_length
        return RunEnd(step, complete, tokens, self.stop.agreed if stopped else None)

    def _roll_back_after(self, report: StepReport) -> int | None:
        """Roll back if the step has a loss spike that asks for it; return the step of the checkpoint, else None."""
        if report.spike is None or not report.spike.rolls_back:
            return None
        back = self.roll_back(report.step, report.spike.rule)
        if back is not None:
            self.callbacks.on_rollback(report.step, back, self.schedule.passed_over[-1].samples)
        return back

    def _evaluates_after(self, step: int) -> bool:
        train = self.config.train
        return train.eval_every > 0 and (step % train.eval_every == 0 or step == train.last_step)

    def _evaluate(self, step: int) -> None:
        """Evaluate on every validation set, until a stop request."""
        self.callbacks.on_phase("evaluate", step)
        for name in self.evaluator.names:
            loss = self.evaluator.evaluate(name)
            if self.stop.agreed is None:
                self.callbacks.on_evaluate(step, name, loss)

    def _report_saves(self) -> None:
        for report in self.checkpointer.take_reports():
            self.callbacks.on_checkpoint(report)

    def _progress(self, step: int) -> dict[str, Any]:
        consumed = self.schedule.consumed(step)
        counts = self.datasets.counts(self.schedule.position(step))
        return {
            "step": step,
            "consumed_samples": consumed,
            "consumed_tokens": consumed * self.config.data.sequence_length,
            "seed": self.config.run.seed,
            "data": {
                "order": self.config.data.order,
                "order_sha256": self.plan.order_digest,
                "sources": [
                    {"prefix": str(source.location), "samples": count}
                    for source, count in zip(self.config.data.train, counts, strict=True)
                ],
            },
            "passed_over": [asdict(gap) for gap in self.schedule.passed_over],
            "recent_losses": self.spike_detector.losses,
            "kernels": asdict(self.kernels),
            "optimizer": self.state.scalar_state(),
        }

    @contextmanager
    def _settle_on_error(self) -> Iterator[None]:
        """On an error, let this rank finish its part of the current save before it ends."""
        try:
            yield
        except UserError:
            self.checkpointer.settle()
            raise

    def _prefetch(self) -> Prefetcher[list[SampleMicrobatch]]:
        schedule = self.schedule
        return Prefetcher(
            lambda step: self.loader.read(schedule.samples(step)),
            depth=self.config.data.prefetch,
            last=self.config.train.last_step,
        )

    def _train_stream(self, microbatches: int) -> tuple[Instruction, ...]:
        schedule = SCHEDULES[self.config.parallel.schedule]
        return schedule(self.mesh.pipeline.rank, self.plan.placement, microbatches)

    def _learning_rate(self, step: int) -> float | None:
        if self.config.deepspeed.scheduler is not None:
            return None
        return learning_rate(step, self.config.train.steps, self.config.schedule, self.config.optimizer.lr)


def _choose_kernels_on_rank_zero(config: RunConfig, mesh: Mesh, saved: Kernels | None) -> Kernels:
    """Benchmark the kernels on rank 0, and return its choice on every rank. Collective."""
    products, attention, dtype = config.train.cpu_products, config.train.cpu_attention, DTYPES[config.precision]

    def choose() -> dict[str, Any]:
        return asdict(choose_kernels(mesh.device, dtype, products=products, attention=attention, saved=saved))

    return Kernels(**on_rank_zero(choose, mesh))
