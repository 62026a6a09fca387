"""Assembly and the loop: from a plan to a trained model, on one rank among the others."""

import datetime
import os
import time
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
import torch.distributed as dist

from megalite.data.batches import BatchReader, Samples
from megalite.distributed import ProcessGrid, local_device, process_grid
from megalite.launch import LaunchEnvironment
from megalite.learning_rate import learning_rate
from megalite.model.stage import Stage
from megalite.pipeline.executor import Microbatch, PipelineExecutor, StepResult
from megalite.pipeline.instructions import Instruction
from megalite.pipeline.schedule import SCHEDULES, forward_only
from megalite.pipeline.timeline import Span
from megalite.plan import Datasets, Plan, open_datasets
from megalite.recorder import RunRecorder, StepReport
from megalite.zero import ZeroEngine


def train(plan: Plan, environment: LaunchEnvironment) -> None:
    """Train one rank's part of `plan`; the other ranks of its layout run the same beside it.

    Raises UserError for what the user can mend, FloatingPointError where training diverges to no number.
    """
    if environment.launcher != "megalite":  # which has looked already, once for all ranks
        plan.check_data()
    timeout = datetime.timedelta(seconds=plan.config.train.timeout_seconds)
    device = local_device(environment.local_rank)
    # DeepSpeed reads it from the environment, where not every launcher has put it.
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    with process_grid(plan.layout, environment.rank, device=device, timeout=timeout) as grid:
        trainer = Trainer(plan, grid, open_datasets(plan.config))
        trainer.run()
        trainer.close()


class Trainer:
    """One rank of a run: its stage, engine, executor and data. Collective: every rank builds and calls it alike."""

    def __init__(self, plan: Plan, grid: ProcessGrid, datasets: Datasets) -> None:
        self.plan, self.config, self.grid = plan, plan.config, grid
        self.engine = ZeroEngine({grid.coordinate.pipeline: build_stage(plan, grid)}, self.config, grid)
        train = self.config.train
        self.executor = PipelineExecutor(
            self.engine,
            grid.links,
            rank=grid.coordinate.pipeline,
            num_stages=plan.layout.pipeline,
            activation_shape=(train.micro_batch_size, self.config.data.sequence_length, self.config.model.hidden_size),
            dtype=self.engine.dtype,
            device=grid.device,
        )
        self.train_reader = self._reader(datasets.train)
        self.valid_reader = self._reader(datasets.valid) if datasets.valid else None
        self.unigram_entropy = datasets.unigram_entropy
        self.eval_batches = 0
        if datasets.valid is not None:
            self.eval_batches = min(train.eval_batches, datasets.valid.samples_per_epoch // train.global_batch_size)
        place = (grid.coordinate.pipeline, plan.layout.pipeline, self.config.gradient_accumulation_steps)
        self.train_stream = SCHEDULES[self.config.parallel.schedule](*place)
        self.eval_stream = forward_only(*place)

    def run(self) -> None:
        """Train to the last step, or to `train.stop_after`, with evaluations and records on the way."""
        train = self.config.train
        last = min(train.steps, train.stop_after or train.steps)
        recorder = RunRecorder(self.plan, self.grid, self.engine.dtype, self.unigram_entropy)
        with closing(recorder):
            for step in range(1, last + 1):
                record = step in train.trace_steps
                report, spans = self._timed_step(step, record=record)
                recorder.step(report)
                if record:
                    recorder.timeline(step, spans)
                if train.eval_every and self.valid_reader and (step % train.eval_every == 0 or step == last):
                    recorder.evaluation(step, self.evaluate())
            recorder.finish(complete=last == train.steps)

    def step(self, step: int) -> StepReport:
        """Run training step number `step`, from 1, and return what came of it."""
        return self._timed_step(step, record=False)[0]

    def _timed_step(self, step: int, *, record: bool) -> tuple[StepReport, tuple[Span, ...]]:
        if record:
            dist.barrier()  # one zero of time for all ranks
        started = time.perf_counter()
        with self.engine.accumulate():
            result = self._run_stream(self.train_stream, self.train_reader, step - 1, record=record)
        rate = self._learning_rate(step)
        outcome = self.engine.step(rate)
        loss = self._mean_loss(result)
        used = self.engine.learning_rate if rate is None else rate
        return StepReport(step, loss, outcome, used, time.perf_counter() - started), result.spans

    def evaluate(self) -> float:
        """Return the mean loss over the first `eval_batches` global batches of the validation set."""
        assert self.valid_reader is not None
        losses = [
            self._mean_loss(self._run_stream(self.eval_stream, self.valid_reader, batch))
            for batch in range(self.eval_batches)
        ]
        return sum(losses) / len(losses)

    def close(self) -> None:
        self.engine.close()

    def _reader(self, samples: Samples) -> BatchReader:
        return BatchReader(
            samples,
            global_batch_size=self.config.train.global_batch_size,
            micro_batch_size=self.config.train.micro_batch_size,
            data_rank=self.grid.coordinate.data,
            data_size=self.plan.layout.data,
        )

    def _run_stream(
        self, stream: Sequence[Instruction], reader: BatchReader, batch: int, *, record: bool = False
    ) -> StepResult:
        microbatches = [
            Microbatch(
                ids=self._to_device(ids) if self.grid.is_first_stage else None,
                targets=self._to_device(targets) if self.grid.is_last_stage else None,
            )
            for ids, targets in reader.microbatches(batch)
        ]
        return self.executor.run(stream, microbatches, record=record)

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


def build_stage(plan: Plan, grid: ProcessGrid) -> Stage:
    """Build this rank's stage with the weights that (seed, name) give it."""
    index = grid.coordinate.pipeline
    stage = Stage(
        plan.config.model,
        plan.stage_layers[index],
        index=index,
        num_stages=plan.layout.pipeline,
        group=grid.tensor,
    )
    stage.initialise(plan.config.run.seed)
    return stage
