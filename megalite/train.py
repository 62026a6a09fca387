"""Assembly and the loop: from a plan to a trained model, on one rank among the others."""

import datetime
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from megalite.agreement import run_facts
from megalite.bad_steps import BadSteps
from megalite.checkpoint.weights import Weights, WeightSource
from megalite.checkpointer import Checkpointer
from megalite.data.batches import BatchReader, BatchSchedule, ReadAhead, SampleMicrobatch, SampleRules
from megalite.data.datasets import Datasets, open_datasets
from megalite.data.samples import Samples
from megalite.distributed import ProcessGrid, gather_json, local_device, process_grid
from megalite.errors import UserError
from megalite.files import sole_user
from megalite.launch import LaunchEnvironment
from megalite.learning_rate import learning_rate
from megalite.model.dropout import DropoutStreams
from megalite.model.loading import load_stage
from megalite.model.packing import PackedDocuments
from megalite.model.stage import Stage
from megalite.pipeline.executor import Microbatch, PipelineExecutor, StepResult
from megalite.pipeline.instructions import Instruction
from megalite.pipeline.schedule import SCHEDULES, forward_only
from megalite.pipeline.timeline import Span
from megalite.plan import Plan
from megalite.recorder import RunRecorder, StepReport
from megalite.rendezvous import agree
from megalite.resume import find_start
from megalite.zero import ZeroEngine
from megalite.zero_state import ZeroState


def train(plan: Plan, environment: LaunchEnvironment) -> None:
    """Train one rank's part of `plan`; the other ranks of its layout run the same beside it.

    Raises UserError for what the user can mend, a rank of another run, code or data among it, and where
    `train.max_bad_steps` steps in a row had to be skipped; RanksMissing where some do not come.
    """
    if environment.launcher != "megalite":  # which has looked already, once for all ranks
        plan.check_start()
        plan.check_data()
    timeout = datetime.timedelta(seconds=plan.config.train.timeout_seconds)
    device = local_device(environment.local_rank)
    # DeepSpeed reads it from the environment, where not every launcher has put it.
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    store = agree(environment, run_facts(plan, environment.world_size), timeout)
    with (
        ExitStack() as stack,
        process_grid(
            plan.layout, environment.rank, device=device, timeout=timeout, placement=plan.placement, store=store
        ) as grid,
    ):
        claim_folder(plan.config.run.dir, grid, stack)
        trainer = Trainer(plan, grid, open_datasets(plan.config))
        with stop_signals():
            trainer.run()
        trainer.close()


class Trainer:
    """One rank of a run: its stage, engine, executor and data. Collective: every rank builds and calls it alike."""

    def __init__(
        self,
        plan: Plan,
        grid: ProcessGrid,
        datasets: Datasets,
        *,
        reached: Callable[[str], None] = lambda point: None,
    ) -> None:
        """Build this rank's part; `reached` hears of the points of every save, as `Checkpointer` says."""
        self.plan, self.config, self.grid = plan, plan.config, grid
        self.start = find_start(plan, grid)
        self.engine = ZeroEngine(build_stages(plan, grid, self.start.weights), self.config, grid)
        self.state = ZeroState(self.engine)
        self._restore()
        self.bad_steps = BadSteps(self.config.train.max_bad_steps, self.engine.stages, grid)
        self.checkpointer = Checkpointer(
            self.config.checkpoint,
            plan.checkpoints,
            self.state,
            grid,
            total_elements=sum(map(prod, plan.expectation.shapes.values())),
            files=plan.companion_files() if grid.rank == 0 else {},
            reached=reached,
        )
        train = self.config.train
        self.executor = PipelineExecutor(
            self.engine,
            grid.links,
            placement=plan.placement,
            rank=grid.coordinate.pipeline,
            activation_shape=next(iter(self.engine.stages.values())).activation_shape(
                train.micro_batch_size, self.config.data.sequence_length
            ),
            dtype=self.engine.dtype,
            device=grid.device,
        )
        self.datasets = datasets
        self.schedule = BatchSchedule(train)
        rules = SampleRules.of(self.config, datasets.fim)
        reader = self._reader(datasets.train, rules)
        self.batches = ReadAhead(
            lambda step: reader.microbatches(self.schedule.samples(step)),
            depth=self.config.data.prefetch,
            last=train.stop_after or train.steps,
        )
        # What is evaluated is text as it stands.
        self.valid_readers = {
            name: self._reader(samples, replace(rules, fim=None)) for name, samples in datasets.valid.items()
        }

    def run(self) -> None:
        """Train to the last step, or to `train.stop_after`, with evaluations, checkpoints and records on the way."""
        train = self.config.train
        last = train.stop_after or train.steps
        recorder = RunRecorder(self.plan, self.grid, self.engine.dtype, self.datasets, self.start)
        with closing(recorder), self._settled_when_stopped():
            for step in range(self.start.step + 1, last + 1):
                record = step in train.trace_steps
                report, spans = self._timed_step(step, record=record)
                recorder.step(report)
                self.bad_steps.count(step, skipped=report.outcome.skipped, loss_scale=report.outcome.loss_scale)
                if record:
                    recorder.timeline(step, spans)
                if train.eval_every and (step % train.eval_every == 0 or step == last):
                    for name in self.valid_readers:
                        recorder.evaluation(step, name, self.evaluate(name))
                if self.checkpointer.due(step, last):
                    self.save(step)
                recorder.checkpoints(self.checkpointer.take_reports())
            self.checkpointer.wait()
            recorder.checkpoints(self.checkpointer.take_reports())
            recorder.finish(complete=max(last, self.start.step) == train.steps)

    def save(self, step: int) -> None:
        """Save a checkpoint of the state after `step`; raise UserError where that fails."""
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
                    for source, count in zip(self.config.data.train, self.datasets.counts(consumed), strict=True)
                ],
            },
            "optimizer": self.state.numbers(),
        }

    def _restore(self) -> None:
        start = self.start
        if start.reader is not None:
            self.state.restore(start.reader, start.reader.state["optimizer"])
        elif start.weights is not None:
            self.state.restore_weights(WeightSource(start.weights))

    @contextmanager
    def _settled_when_stopped(self) -> Iterator[None]:
        """A rank that has to stop leaves no checkpoint half written that it could finish."""
        try:
            yield
        except (SystemExit, UserError):
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
        if record:
            dist.barrier()  # one zero of time for all ranks
        started = time.perf_counter()
        batch = self.batches.take(step)
        with self.engine.accumulate(), self.bad_steps.watched():
            microbatches = self._microbatches(batch, self._counted(batch), trains=True)
            result = self.executor.run(self._train_stream(len(batch)), microbatches, record=record)
        rate = self._learning_rate(step)
        self.checkpointer.before_update()
        before_update()
        outcome = self.engine.step(rate)
        loss = self._mean_loss(result)
        report = StepReport(
            step=step,
            loss=loss,
            outcome=outcome,
            learning_rate=self.engine.learning_rate if rate is None else rate,
            samples=len(self.schedule.samples(step)),
            consumed_samples=self.schedule.consumed(step),
            seconds=time.perf_counter() - started,
            data_seconds=self.batches.waited,
        )
        return report, result.spans

    def evaluate(self, name: str) -> float:
        """Return the mean loss over the first `eval_batches` global batches of a validation set, or all it has."""
        size, reader = self.config.train.global_batch_size, self.valid_readers[name]
        batches = min(self.config.train.eval_batches, self.datasets.valid[name].samples_per_epoch // size)
        total, tokens = 0.0, 0.0
        for first in range(0, batches * size, size):
            batch = reader.microbatches(range(first, first + size))
            counted = self._counted(batch)
            microbatches = self._microbatches(batch, counted, trains=False)
            loss = self._mean_loss(self.executor.run(self._eval_stream(len(batch)), microbatches))
            weight = float(size if counted is None else counted)
            total, tokens = total + loss * weight, tokens + weight
        return total / max(tokens, 1.0)

    def close(self) -> None:
        self.batches.close()
        self.checkpointer.close()
        self.engine.close()

    def _reader(self, samples: Samples, rules: SampleRules) -> BatchReader:
        return BatchReader(
            samples,
            rules,
            micro_batch_size=self.config.train.micro_batch_size,
            data_rank=self.grid.coordinate.data,
            data_size=self.plan.layout.data,
        )

    def _train_stream(self, microbatches: int) -> tuple[Instruction, ...]:
        schedule = SCHEDULES[self.config.parallel.schedule]
        return schedule(self.grid.coordinate.pipeline, self.plan.placement, microbatches)

    def _eval_stream(self, microbatches: int) -> tuple[Instruction, ...]:
        return forward_only(self.grid.coordinate.pipeline, self.plan.placement, microbatches)

    def _counted(self, batch: Sequence[SampleMicrobatch]) -> float | None:
        """Return how many targets of the global batch count; None where all do. Collective over the data axis."""
        if batch[0].counts is None:
            return None
        mine = sum(int(microbatch.counts.sum()) for microbatch in batch if microbatch.counts is not None)
        total = torch.tensor(mine, dtype=torch.float64, device=self.grid.device)
        dist.all_reduce(total, group=self.grid.data)
        return float(total)

    def _microbatches(
        self, batch: Sequence[SampleMicrobatch], counted: float | None, *, trains: bool
    ) -> list[Microbatch]:
        return [self._microbatch(microbatch, counted, trains) for microbatch in batch]

    def _microbatch(self, read: SampleMicrobatch, counted: float | None, trains: bool) -> Microbatch:
        packing = weights = None
        if read.document_lengths is not None or read.positions is not None:
            positions = None if read.positions is None else self._to_device(read.positions)
            packing = PackedDocuments(read.document_lengths, positions)
        if read.counts is not None and counted is not None and self.grid.has_last_stage:
            # The gradients of the data axis are averaged, and a mean over all that counts is asked for.
            weight = self.plan.layout.data / max(counted, 1.0)
            weights = self._to_device(read.counts).to(torch.float32) * weight
        return Microbatch(
            ids=self._to_device(read.ids) if self.grid.has_first_stage else None,
            targets=self._to_device(read.targets) if self.grid.has_last_stage else None,
            packing=packing,
            loss_weights=weights,
            dropout=DropoutStreams.of(self.config.model, self.config.run.seed, read.samples) if trains else None,
        )

    def _to_device(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens)).to(self.grid.device, non_blocking=True)

    def _learning_rate(self, step: int) -> float | None:
        if self.config.deepspeed.scheduler is not None:
            return None
        return learning_rate(step, self.config.train.steps, self.config.schedule, self.config.optimizer)

    def _mean_loss(self, result: StepResult) -> float:
        """Average over the data axis and tell every rank; one tensor rank of the last stage speaks for the others."""
        total = torch.zeros((), dtype=torch.float64, device=self.grid.device)
        if result.loss is not None and self.grid.coordinate.tensor == 0:
            total += result.loss.double()
        dist.all_reduce(total)
        return float(total) / self.plan.layout.data


def build_stages(plan: Plan, grid: ProcessGrid, weights: Weights | None = None) -> dict[int, Stage]:
    """Build this rank's stages with the given weights, or with those that (seed, name) give them."""
    parallel = plan.config.parallel
    group = replace(grid.tensor, sequence_parallel=parallel.sequence_parallel, overlap=parallel.overlap)
    stages: dict[int, Stage] = {}
    for index in grid.stages:
        stage = stages[index] = Stage(
            plan.config.model,
            plan.stage_layers[index],
            index=index,
            num_stages=plan.placement.num_stages,
            group=group,
            rows=plan.config.train.micro_batch_size,
            recompute=plan.config.recompute,
            table=stages[0].tied_table if 0 in stages else None,
        )
        if weights is None:
            stage.initialise(plan.config.run.seed)
        else:
            load_stage(stage, weights)
    return stages


def claim_folder(folder: Path, grid: ProcessGrid, until: ExitStack) -> None:
    """Keep other runs out of a run's folder; raise UserError on every rank where one is in. Collective."""
    refusal = None
    if grid.rank == 0:
        try:
            until.enter_context(sole_user(folder, f"run.dir={folder}"))
        except UserError as error:
            refusal = str(error)
    if refusal := gather_json(refusal, grid)[0]:
        raise UserError(refusal)


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn the signals that ask a rank to stop into SystemExit, so that what it has begun is brought to an end."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
