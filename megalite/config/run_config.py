"""A whole run: its sections, and how they fit each other and the ranks."""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, InstanceOf, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from megalite.config.activation_checkpointing import CHECKPOINT_INTERVAL, NUMBER_CHECKPOINTS
from megalite.config.cross_checks import (
    compile_faults,
    deepspeed_faults,
    fit_faults,
    optimizer_faults,
    recompute_faults,
    rollback_faults,
)
from megalite.config.data import DataSection
from megalite.config.deepspeed.defaults import with_defaults
from megalite.config.deepspeed.rules import Precision
from megalite.config.deepspeed.settings import DeepSpeedSettings
from megalite.config.deepspeed.zero_rates import zero_rate_note
from megalite.config.engine_choice import Engine, chosen_engine, engine_faults
from megalite.config.plugins import PLUGINS
from megalite.config.sections import (
    AnyFamily,
    CheckpointSection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    ScheduleSection,
    TrainSection,
)
from megalite.config.yaml12 import Dumper
from megalite.model.config import ModelConfig
from megalite.model.recompute import Recompute
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.placement import Placement
from megalite.pipeline.schedules import placement
from megalite.settings.section import FilePath, PathText, Section
from megalite.settings.validation import Fault, Origin, report, show

_JSON_OR_PATH = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})


class RunConfig(Section, frozen=True):
    """A whole run; made by `load_run_config`, complete after `resolve`."""

    run: RunSection
    model: Annotated[ModelConfig, AnyFamily()]
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    resume: PathText = "auto"
    """``auto``: from the newest whole checkpoint of `run.dir`, if there is one; ``never``; or a checkpoint's path."""
    init_from: FilePath | None = None
    """The weights to begin with: a checkpoint, a run's folder, or a Hugging Face folder."""
    plugins: Annotated[tuple[str, ...], PLUGINS] = ()
    """Python modules that every process of the run imports before it reads the rest of the run file."""
    deepspeed: Annotated[InstanceOf[DeepSpeedSettings], _JSON_OR_PATH] = DeepSpeedSettings()
    """The path of a DeepSpeed JSON, or its content; ZeRO stage 1 unless given."""
    origin: SkipJsonSchema[InstanceOf[Origin]] = Field(default=Origin(), exclude=True, repr=False)

    def faults(self) -> Iterator[Fault]:
        yield from optimizer_faults(self.train, self.deepspeed)
        if self.train.eval_every and not self.data.has_validation:
            text = f"={self.train.eval_every} has nothing to evaluate on; give data.valid or data.split"
            yield Fault(("train", "eval_every"), text)
        if self.init_from is not None and self.resume not in ("auto", "never"):
            text = f"={show(str(self.init_from))} stands beside resume={show(self.resume)}, which has weights too"
            yield Fault(("init_from",), f"{text}; keep one of them")
        if self.train.max_restarts and self.resume != "auto":
            text = f"={self.train.max_restarts} has ranks go on from the newest checkpoint, and resume="
            yield Fault(("train", "max_restarts"), f"{text}{show(self.resume)}; use resume=auto, or max_restarts=0")
        if self.train.max_restarts and not self.checkpoint.every:
            text = f"={self.train.max_restarts} has ranks go on from the newest checkpoint, and with checkpoint.every=0"
            fix = "there is none before the last step; set checkpoint.every, or max_restarts=0"
            yield Fault(("train", "max_restarts"), f"{text} {fix}")
        yield from recompute_faults(self.train, self.deepspeed)
        yield from compile_faults(self)
        yield from rollback_faults(self)
        schedule = self.train.schedule
        if schedule is not None and schedule.min_lr is not None and schedule.min_lr > self.optimizer.lr:
            text = f"={show(schedule.min_lr)} is above the learning rate {show(self.optimizer.lr)}; use at most that"
            yield Fault(("train", "schedule", "min_lr"), text)

    @property
    def source(self) -> Path:
        """The run file's name, for messages."""
        return Path(self.origin.file)

    @property
    def notes(self) -> tuple[str, ...]:
        """What became of settings that could not stand as they were, a line each."""
        return self.origin.notes

    @property
    def layout(self) -> ParallelLayout:
        """The grid of ranks."""
        if self.parallel.data == "auto":
            raise ValueError("parallel.data is known after RunConfig.resolve")
        return self.parallel.layout(self.parallel.data)

    @property
    def placement(self) -> Placement:
        """Which pipeline rank holds which stages."""
        return placement(self.parallel.schedule, self.parallel.pipeline, self.parallel.virtual_stages)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Microbatches that each rank runs in a step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.layout.group_size("batch"))

    @property
    def precision(self) -> Precision:
        """The dtype of parameters and activations."""
        return self.deepspeed.precision

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self.deepspeed.zero_stage

    @property
    def engine(self) -> Engine:
        """The sharding engine that trains the run."""
        return chosen_engine(self.parallel)

    @property
    def sharding(self) -> str:
        """The ZeRO stage for people, and the engine where it is not DeepSpeed's: ``ZeRO-2 by FSDP2``."""
        return f"ZeRO-{self.zero_stage}" + (" by FSDP2" if self.engine == "torch" else "")

    @property
    def gradient_clipping(self) -> float:
        """The largest global gradient norm; 0 means no clipping."""
        return self.deepspeed.gradient_clipping

    @property
    def optimizer(self) -> OptimizerSection:
        """The optimizer, from whichever of the two places states it."""
        section = self.train.optimizer
        stated = self.deepspeed.optimizer_with(section.stated if section is not None else {})
        if stated is None:
            return section or OptimizerSection()
        return OptimizerSection(**stated, groups=section.groups if section is not None else ())

    @property
    def schedule(self) -> ScheduleSection:
        """The run file's learning-rate schedule, in force where ``deepspeed.scheduler`` is None."""
        return (self.train.schedule or ScheduleSection()).resolved(self.optimizer.lr)

    @property
    def recompute(self) -> Recompute | None:
        """The activations that a backward computes anew, from both places that state them; None for none of them."""
        asked = self.deepspeed.recompute
        mode = self.train.recompute or ("full" if asked else "none")
        if mode == "none":
            return None
        kept = asked.get(NUMBER_CHECKPOINTS, 0)
        return Recompute(
            mode,
            every=self.train.recompute_every,
            segment=asked.get(CHECKPOINT_INTERVAL, 0) or (ceil(self.model.num_hidden_layers / kept) if kept else 1),
            partition=bool(asked.get("activation_checkpointing.partition_activations")),
            cpu=bool(asked.get("activation_checkpointing.cpu_checkpointing")),
        )

    def resolve(self, *, world_size: int | None, vocab_size: int | None) -> "RunConfig":
        """Return the run with nothing left open, checked as a whole.

        Args:
            world_size: ranks that the launcher started; None before any launch, when "auto" means one replica.
            vocab_size: the tokenizer's; None where there is no tokenizer, and model.vocab_size must be given.

        Raises:
            UserError: sizes that do not divide, a world that is not the layout's, a vocabulary that is too small, a
                sequence longer than the positions, a precision that the ZeRO stage does not have, a statement in the
                DeepSpeed JSON that disagrees.
        """
        config = self._completed(world_size, vocab_size)
        lines = [self.origin.line(fault) for fault in fit_faults(config, world_size, vocab_size)]
        asked = engine_faults(config.engine, self.deepspeed.document, self.deepspeed.origin)
        lines += [self.origin.line(fault) for fault in asked]
        lines += [self.deepspeed.origin.line(fault) for fault in deepspeed_faults(config)]
        report(lines)
        return config

    def _completed(self, world_size: int | None, vocab_size: int | None) -> "RunConfig":
        parallel, model, train, checkpoint = self.parallel, self.model, self.train, self.checkpoint
        if parallel.data == "auto":
            replicas = (world_size or 0) // parallel.layout(data=1).world_size
            parallel = parallel.model_copy(update={"data": max(1, replicas)})
        if model.vocab_size is None:
            model = model.model_copy(update={"vocab_size": vocab_size})
        if self.deepspeed.optimizer is None:
            train = train.model_copy(update={"optimizer": self.optimizer})
        if self.deepspeed.scheduler is None:
            train = train.model_copy(update={"schedule": self.schedule})
        if self.deepspeed.on_nvme and "last" not in checkpoint.model_fields_set:
            # A checkpoint cannot read what lies on NVMe: nobody asked for one, so the run is not refused.
            checkpoint = checkpoint.model_copy(update={"last": False})
        deepspeed = _with_note_of_zero_rates(with_defaults(self.deepspeed, lr=self.optimizer.lr), train.steps)
        completed = {"parallel": parallel, "model": model, "train": train, "checkpoint": checkpoint}
        return self.model_copy(update={**completed, "deepspeed": deepspeed})

    def to_yaml(self) -> str:
        """Return the run file that loads back to an equal config, the DeepSpeed JSON within it."""
        document = self.model_dump(mode="json", by_alias=True, exclude={"deepspeed"}, exclude_none=True)
        if not self.plugins:
            del document["plugins"]  # so that earlier versions can read the run file
        document["deepspeed"] = self.deepspeed.spelled()
        return yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def _with_note_of_zero_rates(settings: DeepSpeedSettings, steps: int) -> DeepSpeedSettings:
    note = zero_rate_note(settings.scheduler, steps) if settings.scheduler is not None else None
    if note is None:
        return settings
    return replace(settings, notes=tuple(dict.fromkeys((*settings.notes, settings.origin.line(note)))))
