"""The training loop of one rank, with evaluation, checkpoints and loss spike rollback."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist

from megalite.checkpoint.weights import WeightSource
from megalite.config import RunConfig
from megalite.config.sections import SpikeSection
from megalite.data.batch_schedule import PassedOver
from megalite.data.collate import SampleMicrobatch, SampleRules
from megalite.data.datasets import Datasets
from megalite.data.prefetch import ReadAhead
from megalite.errors import UserError
from megalite.kernels.choice import Kernels
from megalite.model.kernel_choice import choose_kernels
from megalite.model.loss import LOSS
from megalite.model.precision import DTYPES
from megalite.monitoring.heartbeat import Progress
from megalite.monitoring.run_state import RunStateWriter
from megalite.optim.learning_rate import learning_rate
from megalite.parallel.json_collectives import on_rank_zero
from megalite.parallel.mesh import Mesh
from megalite.pipeline.executor import PipelineExecutor, StepResult
from megalite.pipeline.instructions import Instruction
from megalite.pipeline.schedules import SCHEDULES, forward_only
from megalite.pipeline.stage_io import exchange_edges
from megalite.pipeline.timeline.spans import Span
from megalite.training.build import build_engine, first_trained_stage
from megalite.training.checkpointing import Checkpointer
from megalite.training.loss_spikes import LossSpikeDetector
from megalite.training.microbatches import MicrobatchLoader
from megalite.training.named_losses import NamedLosses
from megalite.training.nonfinite import NonFiniteGuard
from megalite.training.plan import Plan
from megalite.training.resume import find_start
from megalite.training.run_logger import RunLogger
from megalite.training.step_report import StepReport
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
        on_save_point: Callable[[str], None] = lambda point: None,
    ) -> None:
        """Build the parts of this rank; `on_save_point` is called as `Checkpointer` describes.

        `stop` holds the stop requests, `progress` receives the current phase and step, `restarts` is the number of
        restarts of the ranks, and on rank 0 `marker` records that training runs and how it ended.
        """
        self.plan, self.config, self.mesh = plan, plan.config, mesh
        self.stop, self.progress, self.restarts = stop or StopRequests(), progress or Progress(), restarts
        self.marker = marker
        self.start = find_start(plan, mesh)
        self.kernels = _choose_kernels_on_rank_zero(self.config, mesh, self.start.kernels)
        self.engine = build_engine(plan, mesh, self.start.weights, self.kernels)
        self.state = self.engine.state
        self._restore()
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
            files=plan.companion_files() if mesh.rank == 0 else {},
            on_save_point=on_save_point,
            on_progress=self.progress.touch,
        )
        self.engine.on_update_progress(self.progress.touch)
        train = self.config.train
        size = train.micro_batch_size, self.config.data.sequence_length
        self.executor = PipelineExecutor(
            self.engine,
            mesh.links,
            placement=plan.placement,
            rank=mesh.pipeline.rank,
            edges=exchange_edges({index: stage.edge(*size) for index, stage in self.engine.stages.items()}, mesh),
            device=mesh.device,
            first_trained=first_trained_stage(self.engine.stages, mesh),
            on_progress=self.progress.touch,
        )
        self.train_losses, self.valid_losses = NamedLosses(mesh), NamedLosses(mesh)
        self.datasets = datasets
        self.schedule = self.start.batches(train)
        rules = SampleRules.of(self.config, datasets.fim)
        self.loader = MicrobatchLoader(datasets.train, rules, self.config, mesh, trains=True)
        self.batches = self._prefetch()
        without_fim = replace(rules, fim=None)
        self.valid_loaders = {
            name: MicrobatchLoader(samples, without_fim, self.config, mesh, trains=False)
            for name, samples in datasets.valid.items()
        }

    def run(self) -> bool:
        """Train to the last step, or to `train.stop_after`, with evaluations, checkpoints and logs.

        Returns whether a stop request ended the training before that step; then a checkpoint was saved, unless the
        configuration has none.
        """
        train = self.config.train
        last = train.stop_after or train.steps
        logger = RunLogger(
            *(self.plan, self.mesh, self.engine.dtype, self.datasets, self.start, self.stop),
            kernels=self.kernels,
            marker=self.marker,
        )
        if self.restarts:
            logger.restarted(self.start.step, self.restarts)
        stopped, step = False, self.start.step
        with closing(logger), self._settle_on_error():
            while step < last:
                step += 1
                record = step in train.trace_steps
                report, spans = self._timed_step(step, record=record)
                logger.step(report)
                if report.spike is not None:
                    logger.spike(report, self.schedule.samples(step))
                    if report.spike.rolls_back and (back := self.roll_back(step, report.spike.rule)) is not None:
                        logger.rollback(step, back, self.schedule.passed_over[-1].samples)
                        step = back
                        if stopped := self.stop.agreed is not None:
                            break
                        continue
                skipped = report.outcome.skipped and report.spike is None
                self.nonfinite_guard.update(step, skipped=skipped, loss_scale=report.outcome.loss_scale)
                if record:
                    logger.timeline(step, spans)
                if train.eval_every and (step % train.eval_every == 0 or step == last):
                    self._evaluate(step, logger)
                stopped = self.stop.agreed is not None and step < last
                if self.checkpointer.due(step, last=step if stopped else last):
                    self.save(step)
                logger.checkpoints(self.checkpointer.take_reports())
                if stopped:
                    break
            self.checkpointer.wait()
            logger.checkpoints(self.checkpointer.take_reports())
            if stopped:
                logger.stopped(step, self.stop.agreed)
            complete = not stopped and max(last, self.start.step) == train.steps
            logger.finish(step, complete=complete, stopped=stopped)
        return stopped

    def _evaluate(self, step: int, logger: RunLogger) -> None:
        """Evaluate on every validation set, until a stop request."""
        self.progress.enter("evaluate", step)
        for name in self.valid_loaders:
            loss = self.evaluate(name)
            if self.stop.agreed is None:
                logger.evaluation(step, name, loss)

    def save(self, step: int) -> None:
        """Save a checkpoint of the state after `step`; raise UserError where that fails."""
        self.progress.enter("save", step)
        self.checkpointer.save(self.plan.manifest(step), self._progress(step))

    def _progress(self, step: int) -> dict[str, Any]:
        consumed = self.schedule.consumed(step)
        return {
            "step": step,
            "consumed_samples": consumed,
            "consumed_tokens": consumed * self.config.data.sequence_length,
            "seed": self.config.run.seed,
            "data": {
                "order": self.config.data.order,
                "order_sha256": self.plan.order_digest,
                "sources": [
                    {"prefix": str(source.prefix), "samples": count}
                    for source, count in zip(
                        self.config.data.train, self.datasets.counts(self.schedule.position(step)), strict=True
                    )
                ],
            },
            "passed_over": [asdict(gap) for gap in self.schedule.passed_over],
            "recent_losses": self.spike_detector.losses,
            "kernels": asdict(self.kernels),
            "optimizer": self.state.scalar_state(),
        }

    def _restore(self) -> None:
        start = self.start
        if start.reader is not None:
            self.state.restore(start.reader, start.reader.state["optimizer"])
        elif start.weights is not None:
            self.state.restore_weights(WeightSource(start.weights))

    def roll_back(self, step: int, rule: SpikeSection) -> int | None:
        """Roll back to the newest intact checkpoint and skip the samples from there to the end of `step`.

        Returns the step of the checkpoint, None where there is no checkpoint yet. Raises UserError after
        `train.spike.max_rollbacks` rollbacks.
        """
        self.checkpointer.wait()
        self.progress.enter("start", step)  # a checkpoint is read as at a start, which may take long
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
        gap = PassedOver(start.step, self.schedule.position(step) - begin)
        self.schedule = replace(start, passed_over=(*start.passed_over, gap)).batches(self.config.train)
        self.spike_detector = LossSpikeDetector(rule, start.recent_losses)
        self.state.restore(start.reader, start.reader.state["optimizer"])
        self.engine.sync_model_params_from_master()
        self.batches.close()
        self.batches = self._prefetch()
        return start.step

    @contextmanager
    def _settle_on_error(self) -> Iterator[None]:
        """On an error, let this rank finish its part of the current save before it ends."""
        try:
            yield
        except UserError:
            self.checkpointer.settle()
            raise

    def step(self, step: int, *, before_update: Callable[[], None] = lambda: None) -> StepReport:
        """Run training step number `step`, counted from 1, and return its report.

        `before_update` is called after the gradients were reduced, before they are clipped and applied.
        """
        return self._timed_step(step, record=False, before_update=before_update)[0]

    def _timed_step(
        self, step: int, *, record: bool, before_update: Callable[[], None] = lambda: None
    ) -> tuple[StepReport, tuple[Span, ...]]:
        started = time.perf_counter()
        self.progress.enter("data", step)
        batch = self.batches.take(step)
        self.progress.enter("compute", step)
        self.executor.compute_timer.take()  # drop the time of an evaluation
        with self.engine.accumulate():
            with self.nonfinite_guard.watching():
                microbatches = self.loader.microbatches(batch, self.loader.num_loss_tokens(batch))
                if record:
                    dist.barrier()  # a common start time of the timeline on all ranks
                result = self.executor.run(self._train_stream(len(batch)), microbatches, record=record)
            losses = self._reduce_losses_and_stop_flags(result, self.train_losses)
            loss = losses.pop(LOSS)
            spike = self.spike_detector.update(loss)
            if drops := spike is not None and spike.drops_update:
                self.engine.poison_gradients()
        scheduled_rate = self._learning_rate(step)
        # DeepSpeed's scheduler sets the next step's rate within the step, so the rate is read before.
        rate = self.engine.learning_rate if scheduled_rate is None else scheduled_rate
        self.progress.enter("update", step)
        self.checkpointer.before_update()
        before_update()
        with self.state.preserve_loss_scale() if drops else nullcontext():
            outcome = self.engine.step(scheduled_rate)
        report = StepReport(
            step=step,
            loss=loss,
            other_losses=losses,
            outcome=outcome,
            learning_rate=rate,
            samples=len(self.schedule.samples(step)),
            consumed_samples=self.schedule.consumed(step),
            seconds=time.perf_counter() - started,
            compute_seconds=self.executor.compute_timer.take(),
            data_seconds=self.batches.waited,
            spike=spike,
        )
        return report, result.spans

    def evaluate(self, name: str) -> float:
        """Return the mean loss over the unmasked targets of a validation set.

        It is over the first `eval_batches` global batches, or over all samples if there are fewer; the last batch may
        be partial.

        After a stop request it returns the mean over the batches so far, which must not be used.
        """
        size, loader = self.config.train.global_batch_size, self.valid_loaders[name]
        end = self.datasets.num_evaluated(name)
        total, tokens = 0.0, 0.0
        for first in range(0, end, size):
            if self.stop.agreed is not None:
                break
            samples = range(first, min(first + size, end))
            batch = loader.read_padded(samples)
            num_loss_tokens = loader.num_loss_tokens(batch)
            microbatches = loader.microbatches(batch, num_loss_tokens)
            result = self.executor.run(self._eval_stream(len(batch)), microbatches)
            loss = self._reduce_losses_and_stop_flags(result, self.valid_losses)[LOSS]
            weight = float(
                len(samples) * self.config.data.sequence_length if num_loss_tokens is None else num_loss_tokens
            )
            total, tokens = total + loss * weight, tokens + weight
        return total / max(tokens, 1.0)

    def close(self) -> None:
        self.batches.close()
        self.checkpointer.close()
        self.engine.close()

    def _prefetch(self) -> ReadAhead[list[SampleMicrobatch]]:
        train, schedule = self.config.train, self.schedule
        return ReadAhead(
            lambda step: self.loader.read(schedule.samples(step)),
            depth=self.config.data.prefetch,
            last=train.stop_after or train.steps,
        )

    def _train_stream(self, microbatches: int) -> tuple[Instruction, ...]:
        schedule = SCHEDULES[self.config.parallel.schedule]
        return schedule(self.mesh.pipeline.rank, self.plan.placement, microbatches)

    def _eval_stream(self, microbatches: int) -> tuple[Instruction, ...]:
        return forward_only(self.mesh.pipeline.rank, self.plan.placement, microbatches)

    def _learning_rate(self, step: int) -> float | None:
        if self.config.deepspeed.scheduler is not None:
            return None
        return learning_rate(step, self.config.train.steps, self.config.schedule, self.config.optimizer.lr)

    def _reduce_losses_and_stop_flags(self, result: StepResult, losses: NamedLosses) -> dict[str, float]:
        """Return the losses of all stages, the same on every rank; all ranks agree on whether to stop."""
        means, local_flags = losses.reduce(result.losses, self.stop.local_flags())
        self.stop.synchronize(local_flags)
        return means


def _choose_kernels_on_rank_zero(config: RunConfig, mesh: Mesh, saved: Kernels | None) -> Kernels:
    """Benchmark the kernels on rank 0, and return its choice on every rank. Collective."""
    products, attention, dtype = config.train.cpu_products, config.train.cpu_attention, DTYPES[config.precision]

    def choose() -> dict[str, Any]:
        return asdict(choose_kernels(mesh.device, dtype, products=products, attention=attention, saved=saved))

    return Kernels(**on_rank_zero(choose, mesh))
