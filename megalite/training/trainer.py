"""The training loop of one rank, and the parts of a run that it drives."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
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
from megalite.model.precision import DTYPES
from megalite.monitoring.heartbeat import Progress
from megalite.monitoring.run_state import RunStateWriter
from megalite.optim.learning_rate import learning_rate
from megalite.parallel.json_collectives import on_rank_zero
from megalite.parallel.mesh import Mesh
from megalite.pipeline.executor import PipelineExecutor, StepResult
from megalite.pipeline.instructions import Instruction
from megalite.pipeline.schedules import SCHEDULES, forward_only
from megalite.pipeline.timeline.spans import Span
from megalite.training.build import build_stages
from megalite.training.checkpointing import Checkpointer
from megalite.training.loss_spikes import SpikeWatch
from megalite.training.microbatches import Feed
from megalite.training.nonfinite import BadSteps
from megalite.training.plan import Plan
from megalite.training.resume import find_start
from megalite.training.run_logger import RunRecorder
from megalite.training.step_report import StepReport
from megalite.training.stop_requests import StopRequests
from megalite.zero.engine import ZeroEngine
from megalite.zero.optimizer_state import ZeroState


class Trainer:
    """One rank of a run: its stage, engine, executor and data. Collective: every rank builds and calls it alike."""

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
        """Build this rank's part; `on_save_point` hears of the points of every save, as `Checkpointer` says.

        `stop` is what may end its training early, `progress` hears where it is, `restarts` says how often the ranks
        were started again, and `marker` hears on rank 0 that training begins and how it ended.
        """
        self.plan, self.config, self.mesh = plan, plan.config, mesh
        self.stop, self.progress, self.restarts = stop or StopRequests(), progress or Progress(), restarts
        self.marker = marker
        self.start = find_start(plan, mesh)
        self.kernels = _agreed_kernels(self.config, mesh, self.start.kernels)
        self.engine = ZeroEngine(build_stages(plan, mesh, self.start.weights, self.kernels), self.config, mesh)
        self.state = ZeroState(self.engine)
        self._restore()
        _ = plan.documents  # read at the start: at the first save the folder of `init_from` may be gone
        self.spikes = SpikeWatch(self.config.train.spike, self.start.recent_losses)
        self.rollbacks = 0
        self.bad_steps = BadSteps(self.config.train.max_bad_steps, self.engine.stages, mesh, self.config.run.dir)
        self.checkpointer = Checkpointer(
            self.config.checkpoint,
            plan.checkpoints,
            self.state,
            mesh,
            tensor_bytes=plan.checkpoint_bytes,
            files=plan.companion_files() if mesh.rank == 0 else {},
            on_save_point=on_save_point,
            moved=self.progress.touch,
        )
        for hook in (self.engine.optimizer.register_step_pre_hook, self.engine.optimizer.register_step_post_hook):
            hook(lambda *_: self.progress.touch())  # of several groups, or parts that are on the host, each is a move
        train = self.config.train
        self.executor = PipelineExecutor(
            self.engine,
            mesh.links,
            placement=plan.placement,
            rank=mesh.pipeline.rank,
            activation_shape=next(iter(self.engine.stages.values())).activation_shape(
                train.micro_batch_size, self.config.data.sequence_length
            ),
            dtype=self.engine.dtype,
            device=mesh.device,
            moved=self.progress.touch,
        )
        self.datasets = datasets
        self.schedule = self.start.batches(train)
        rules = SampleRules.of(self.config, datasets.fim)
        self.feed = Feed(datasets.train, rules, self.config, mesh, trains=True)
        self.batches = self._read_ahead()
        as_it_stands = replace(rules, fim=None)
        self.valid_feeds = {
            name: Feed(samples, as_it_stands, self.config, mesh, trains=False)
            for name, samples in datasets.valid.items()
        }

    def run(self) -> bool:
        """Train to the last step, or to `train.stop_after`, with evaluations, checkpoints and records on the way.

        Returns whether the ranks were asked to stop, and agreed to, before that step; they have saved a checkpoint
        then, where there are any.
        """
        train = self.config.train
        last = train.stop_after or train.steps
        recorder = RunRecorder(
            *(self.plan, self.mesh, self.engine.dtype, self.datasets, self.start, self.stop),
            kernels=self.kernels,
            marker=self.marker,
        )
        if self.restarts:
            recorder.restarted(self.start.step, self.restarts)
        stopped, step = False, self.start.step
        with closing(recorder), self._settled_when_failed():
            while step < last:
                step += 1
                record = step in train.trace_steps
                report, spans = self._timed_step(step, record=record)
                recorder.step(report)
                if report.spike is not None:
                    recorder.spike(report, self.schedule.samples(step))
                    if report.spike.rolls_back and (back := self.roll_back(step, report.spike.rule)) is not None:
                        recorder.rollback(step, back, self.schedule.passed_over[-1].samples)
                        step = back
                        if stopped := self.stop.agreed is not None:
                            break
                        continue
                skipped = report.outcome.skipped and report.spike is None
                self.bad_steps.count(step, skipped=skipped, loss_scale=report.outcome.loss_scale)
                if record:
                    recorder.timeline(step, spans)
                if train.eval_every and (step % train.eval_every == 0 or step == last):
                    self._evaluate(step, recorder)
                stopped = self.stop.agreed is not None and step < last
                if self.checkpointer.due(step, last=step if stopped else last):
                    self.save(step)
                recorder.checkpoints(self.checkpointer.take_reports())
                if stopped:
                    break
            self.checkpointer.wait()
            recorder.checkpoints(self.checkpointer.take_reports())
            if stopped:
                recorder.stopped(step, self.stop.agreed)
            complete = not stopped and max(last, self.start.step) == train.steps
            recorder.finish(step, complete=complete, stopped=stopped)
        return stopped

    def _evaluate(self, step: int, recorder: RunRecorder) -> None:
        """Evaluate on every validation set, as long as nobody asks to stop."""
        self.progress.enter("evaluate", step)
        for name in self.valid_feeds:
            loss = self.evaluate(name)
            if self.stop.agreed is None:
                recorder.evaluation(step, name, loss)

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
            "recent_losses": self.spikes.losses,
            "kernels": asdict(self.kernels),
            "optimizer": self.state.numbers(),
        }

    def _restore(self) -> None:
        start = self.start
        if start.reader is not None:
            self.state.restore(start.reader, start.reader.state["optimizer"])
        elif start.weights is not None:
            self.state.restore_weights(WeightSource(start.weights))

    def roll_back(self, step: int, rule: SpikeSection) -> int | None:
        """Go back to the newest whole checkpoint, pass over the samples from there to the end of `step`, and return
        the step it is of; None where there is none yet. Collective.

        Raises UserError where this was done `train.spike.max_rollbacks` times already.
        """
        self.checkpointer.wait()
        self.progress.enter("start", step)  # a checkpoint is read as at a start, which may take long
        start = find_start(replace(self.plan, config=self.config.model_copy(update={"resume": "auto"})), self.mesh)
        if start.reader is None:
            return None
        if self.rollbacks == rule.max_rollbacks:
            raise UserError(
                f"train.spike.max_rollbacks={rule.max_rollbacks} times the run went back, and the loss jumped again at "
                f"step {step}; lower train.optimizer.lr or gradient_clipping, or resume with train.spike.action=skip"
            )
        self.rollbacks += 1
        begin = start.batches(self.config.train).position(start.step)
        gap = PassedOver(start.step, self.schedule.position(step) - begin)
        self.schedule = replace(start, passed_over=(*start.passed_over, gap)).batches(self.config.train)
        self.spikes = SpikeWatch(rule, start.recent_losses)
        self.state.restore(start.reader, start.reader.state["optimizer"])
        self.engine.publish_weights()
        self.batches.close()
        self.batches = self._read_ahead()
        return start.step

    @contextmanager
    def _settled_when_failed(self) -> Iterator[None]:
        """A rank that has to end leaves no checkpoint half written that it could finish."""
        try:
            yield
        except UserError:
            self.checkpointer.settle()
            raise

    def step(self, step: int, *, before_update: Callable[[], None] = lambda: None) -> StepReport:
        """Run training step number `step`, from 1, and return what came of it.

        `before_update` is called once the gradients are whole, before they are clipped and applied.
        """
        return self._timed_step(step, record=False, before_update=before_update)[0]

    def _timed_step(
        self, step: int, *, record: bool, before_update: Callable[[], None] = lambda: None
    ) -> tuple[StepReport, tuple[Span, ...]]:
        started = time.perf_counter()
        self.progress.enter("data", step)
        batch = self.batches.take(step)
        self.progress.enter("compute", step)
        self.executor.compute_timer.take()  # that of an evaluation before
        with self.engine.accumulate():
            with self.bad_steps.watched():
                microbatches = self.feed.microbatches(batch, self.feed.counted(batch))
                if record:
                    dist.barrier()  # one zero of time for all ranks, however long each waited for its batch
                result = self.executor.run(self._train_stream(len(batch)), microbatches, record=record)
            loss = self._mean_loss(result)
            spike = self.spikes.look(loss)
            if drops := spike is not None and spike.drops_update:
                self.engine.spoil()
        own_rate = self._learning_rate(step)
        # DeepSpeed's scheduler sets the next step's rate within the step: it is read before.
        rate = self.engine.learning_rate if own_rate is None else own_rate
        self.progress.enter("update", step)
        self.checkpointer.before_update()
        before_update()
        with self.state.keeping_loss_scale() if drops else nullcontext():
            outcome = self.engine.step(own_rate)
        report = StepReport(
            step=step,
            loss=loss,
            outcome=outcome,
            learning_rate=rate,
            samples=len(self.schedule.samples(step)),
            consumed_samples=self.schedule.consumed(step),
            seconds=time.perf_counter() - started,
            own_seconds=self.executor.compute_timer.take(),
            data_seconds=self.batches.waited,
            spike=spike,
        )
        return report, result.spans

    def evaluate(self, name: str) -> float:
        """Return the mean loss over the targets of a validation set that count: of the samples in its first
        `eval_batches` global batches, or of all where it has no more, whether or not these fill a batch.

        Once the ranks have agreed to stop, it is of the batches so far, and worth nothing.
        """
        size, feed = self.config.train.global_batch_size, self.valid_feeds[name]
        end = self.datasets.num_evaluated(name)
        total, tokens = 0.0, 0.0
        for first in range(0, end, size):
            if self.stop.agreed is not None:
                break
            samples = range(first, min(first + size, end))
            batch = feed.read_padded(samples)
            counted = feed.counted(batch)
            microbatches = feed.microbatches(batch, counted)
            loss = self._mean_loss(self.executor.run(self._eval_stream(len(batch)), microbatches))
            weight = float(len(samples) * self.config.data.sequence_length if counted is None else counted)
            total, tokens = total + loss * weight, tokens + weight
        return total / max(tokens, 1.0)

    def close(self) -> None:
        self.batches.close()
        self.checkpointer.close()
        self.engine.close()

    def _read_ahead(self) -> ReadAhead[list[SampleMicrobatch]]:
        train, schedule = self.config.train, self.schedule
        return ReadAhead(
            lambda step: self.feed.read(schedule.samples(step)),
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
        return learning_rate(step, self.config.train.steps, self.config.schedule, self.config.optimizer)

    def _mean_loss(self, result: StepResult) -> float:
        """Average over the ranks whose losses differ, and tell every rank.

        What the ranks were asked goes with it: after it they agree on whether to stop.
        """
        total = torch.tensor([0.0, *self.stop.asked()], dtype=torch.float64, device=self.mesh.device)
        if result.loss is not None and self.mesh.counts_loss:
            total[0] = result.loss
        dist.all_reduce(total)
        loss, *asked = total.tolist()
        self.stop.agree(asked)
        return loss / self.mesh.loss.size


def _agreed_kernels(config: RunConfig, mesh: Mesh, saved: Kernels | None) -> Kernels:
    """Measure on rank 0 how the device computes fastest, and let all ranks compute so. Collective."""
    products, attention, dtype = config.train.cpu_products, config.train.cpu_attention, DTYPES[config.precision]

    def choose() -> dict[str, Any]:
        return asdict(choose_kernels(mesh.device, dtype, products=products, attention=attention, saved=saved))

    return Kernels(**on_rank_zero(choose, mesh))
