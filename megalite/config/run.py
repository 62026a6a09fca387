"""A whole run: its sections, and how they fit each other and the ranks."""

from collections.abc import Iterator
from math import ceil, gcd
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, InstanceOf

from megalite.config.base import FilePath, Section, divisors
from megalite.config.data import DataSection
from megalite.config.recompute import Recompute
from megalite.config.sections import (
    CheckpointSection,
    Model,
    ModelConfig,
    OptimizerSection,
    ParallelSection,
    RunSection,
    ScheduleSection,
    TrainSection,
)
from megalite.config.yaml12 import Dumper
from megalite.deepspeed_json import DeepSpeedSettings, Precision
from megalite.faults import TEXT, Fault, Origin, alternatives, report, show
from megalite.layout import ParallelLayout
from megalite.pipeline.placement import Placement
from megalite.pipeline.schedule import placement, refusal

_NUMBER = "activation_checkpointing.number_checkpoints"
_INTERVAL = "pipeline.activation_checkpoint_interval"


class RunConfig(Section, frozen=True):
    """A whole run; made by `load_run_config`, complete after `resolve`."""

    run: RunSection
    model: Model
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    resume: Annotated[str, TEXT] = "auto"
    """``auto``: from the newest whole checkpoint of `run.dir`, if there is one; ``never``; or a checkpoint's path."""
    init_from: FilePath | None = None
    """The weights to begin with: a checkpoint, a run's folder, or a Hugging Face folder."""
    deepspeed: InstanceOf[DeepSpeedSettings] = DeepSpeedSettings()
    origin: InstanceOf[Origin] = Field(default=Origin(), exclude=True, repr=False)

    def faults(self) -> Iterator[Fault]:
        for ours, theirs in (("optimizer", self.deepspeed.optimizer), ("schedule", self.deepspeed.scheduler)):
            if getattr(self.train, ours) is not None and theirs is not None:
                other = self.deepspeed.origin.line(Fault(("scheduler" if ours == "schedule" else ours,), ""))
                yield Fault(("train", ours), f" stands beside {other}; keep one of them")
        if self.train.eval_every and not self.data.has_validation:
            text = f"={self.train.eval_every} has nothing to evaluate on; give data.valid or data.split"
            yield Fault(("train", "eval_every"), text)
        if self.init_from is not None and self.resume not in ("auto", "never"):
            text = f"={show(str(self.init_from))} stands beside resume={show(self.resume)}, which has weights too"
            yield Fault(("init_from",), f"{text}; keep one of them")
        yield from _recompute_faults(self.train, self.deepspeed)
        schedule = self.train.schedule
        if schedule is not None and schedule.min_lr > self.optimizer.lr:
            text = f"={show(schedule.min_lr)} is above the learning rate {show(self.optimizer.lr)}; use at most that"
            yield Fault(("train", "schedule", "min_lr"), text)

    @property
    def source(self) -> Path:
        """The run file's name, for messages."""
        return Path(self.origin.file)

    @property
    def layout(self) -> ParallelLayout:
        """The grid of ranks."""
        return ParallelLayout(self.parallel.tensor, self.parallel.pipeline, self._data_size)

    @property
    def placement(self) -> Placement:
        """Which pipeline rank holds which stages."""
        return placement(self.parallel.schedule, self.parallel.pipeline, self.parallel.virtual_stages)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Microbatches that each rank runs in a step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self._data_size)

    @property
    def precision(self) -> Precision:
        """The dtype of parameters and activations."""
        return self.deepspeed.precision

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self.deepspeed.zero_stage

    @property
    def gradient_clipping(self) -> float:
        """The largest global gradient norm; 0 means no clipping."""
        return self.deepspeed.gradient_clipping

    @property
    def optimizer(self) -> OptimizerSection:
        """The optimizer, from whichever of the two places states it."""
        stated = self.deepspeed.optimizer
        if stated is None:
            return self.train.optimizer or OptimizerSection()
        return OptimizerSection(**stated.plain())

    @property
    def schedule(self) -> ScheduleSection:
        """The run file's learning-rate schedule, in force where ``deepspeed.scheduler`` is None."""
        return self.train.schedule or ScheduleSection()

    @property
    def recompute(self) -> Recompute | None:
        """The activations that a backward computes anew, from both places that state them; None for none of them."""
        asked = self.deepspeed.recompute
        mode = self.train.recompute or ("full" if asked else "none")
        if mode == "none":
            return None
        kept = asked.get(_NUMBER, 0)
        return Recompute(
            mode,
            every=self.train.recompute_every,
            segment=asked.get(_INTERVAL, 0) or (ceil(self.model.num_hidden_layers / kept) if kept else 1),
            partition=bool(asked.get("activation_checkpointing.partition_activations")),
            cpu=bool(asked.get("activation_checkpointing.cpu_checkpointing")),
        )

    @property
    def _data_size(self) -> int:
        if self.parallel.data == "auto":
            raise ValueError("parallel.data is known after RunConfig.resolve")
        return self.parallel.data

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
        lines = [self.origin.line(fault) for fault in _fit_faults(config, world_size, vocab_size)]
        lines += [self.deepspeed.origin.line(fault) for fault in _deepspeed_faults(config)]
        report(lines)
        return config

    def _completed(self, world_size: int | None, vocab_size: int | None) -> "RunConfig":
        parallel, model, train = self.parallel, self.model, self.train
        if parallel.data == "auto":
            replicas = (world_size or 0) // (parallel.tensor * parallel.pipeline)
            parallel = parallel.model_copy(update={"data": max(1, replicas)})
        if model.vocab_size is None:
            model = model.model_copy(update={"vocab_size": vocab_size})
        if self.deepspeed.optimizer is None:
            train = train.model_copy(update={"optimizer": self.optimizer})
        if self.deepspeed.scheduler is None:
            train = train.model_copy(update={"schedule": self.schedule})
        return self.model_copy(update={"parallel": parallel, "model": model, "train": train})

    def to_yaml(self) -> str:
        """Return the run file that loads back to an equal config, the DeepSpeed JSON within it."""
        document = self.model_dump(mode="json", by_alias=True, exclude={"deepspeed"}, exclude_none=True)
        document["deepspeed"] = dict(self.deepspeed.document)
        return yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def _recompute_faults(train: TrainSection, deepspeed: DeepSpeedSettings) -> Iterator[Fault]:
    asked = deepspeed.recompute

    def line(key: str) -> str:
        return deepspeed.origin.line(Fault(tuple(key.split(".")), f"={show(asked[key])}"))

    if asked and train.recompute not in (None, "full"):
        first = next(iter(asked))
        text = f"={show(train.recompute)} stands beside {line(first)}, which recomputes whole layers"
        yield Fault(("train", "recompute"), f"{text}; write full, or leave {first} out")
    if train.recompute_every > 1:
        every = ("train", "recompute_every")
        if not asked and train.recompute != "full":
            text = f"={train.recompute_every} belongs to train.recompute=full, not to"
            yield Fault(every, f"{text} {train.recompute or 'none'}; write full, or leave it out")
        for key in (_NUMBER, _INTERVAL):
            if key in asked:
                text = f"={train.recompute_every} stands beside {line(key)}, which recomputes every layer"
                yield Fault(every, f"{text}; keep one of them")


def _fit_faults(config: RunConfig, world_size: int | None, vocab_size: int | None) -> Iterator[Fault]:
    yield from _vocabulary_faults(config.model, vocab_size)
    yield from _tensor_faults(config.model, config.parallel.tensor)
    yield from _token_share_faults(config.parallel, config.train.micro_batch_size, config.data.sequence_length)
    yield from _pipeline_faults(config.model, config.parallel)
    found = list(_world_faults(config.layout, world_size)) or list(_batch_faults(config.train, config.layout.data))
    yield from found or _schedule_faults(config)
    if config.data.sequence_length > config.model.max_position_embeddings:
        positions = config.model.max_position_embeddings
        text = f"={config.data.sequence_length} is longer than model.max_position_embeddings={positions}"
        yield Fault(("data", "sequence_length"), f"{text}; use at most {positions}")


def _vocabulary_faults(model: ModelConfig, vocab_size: int | None) -> Iterator[Fault]:
    if model.vocab_size is None:
        yield Fault(("model", "vocab_size"), " is missing, and there is no tokenizer to take it from; write either")
    elif vocab_size is not None and model.vocab_size < vocab_size:
        text = f"={model.vocab_size} is smaller than the tokenizer's {vocab_size}; use at least that, or leave it out"
        yield Fault(("model", "vocab_size"), text)


def _tensor_faults(model: ModelConfig, tensor: int) -> Iterator[Fault]:
    if fault := tensor_size_fault(model, tensor):
        yield Fault(("parallel", "tensor"), fault)


def tensor_size_fault(model: ModelConfig, tensor: int) -> str | None:
    """Return the first rule that a tensor axis of this size breaks, with sizes that break none; None where it fits."""
    allowed = [size for size in divisors(model.num_attention_heads) if _tensor_rule(model, size) is None]
    broken = _tensor_rule(model, tensor)
    return f"={tensor} {broken}; use {alternatives(allowed)}" if broken else None


def _tensor_rule(model: ModelConfig, tensor: int) -> str | None:
    groups = model.num_key_value_heads
    if model.num_attention_heads % tensor:
        return f"does not divide model.num_attention_heads={model.num_attention_heads}"
    if groups % tensor and tensor % groups:
        return f"neither divides model.num_key_value_heads={groups} nor is divided by it"
    if model.intermediate_size % tensor:
        return f"does not divide model.intermediate_size={model.intermediate_size}"
    if model.vocab_size is not None and model.vocab_size < tensor:
        return f"is more than model.vocab_size={model.vocab_size}"
    return None


def _token_share_faults(parallel: ParallelSection, rows: int, length: int) -> Iterator[Fault]:
    """Find a microbatch whose tokens sequence parallelism cannot share out evenly."""
    size, tokens = parallel.tensor, rows * length
    if not parallel.sequence_parallel or tokens % size == 0:
        return
    text = f"=true divides the {tokens} tokens of a microbatch over parallel.tensor={size} ranks, which is not even"
    lengths = alternatives(_multiples_near(length, size // gcd(size, rows)))
    batches = alternatives(_multiples_near(rows, size // gcd(size, length)))
    fix = f"use a data.sequence_length of {lengths}, or a train.micro_batch_size of {batches}"
    yield Fault(("parallel", "sequence_parallel"), f"{text}; {fix}")


def _pipeline_faults(model: ModelConfig, parallel: ParallelSection) -> Iterator[Fault]:
    layers, stages = model.num_hidden_layers, parallel.pipeline * parallel.virtual_stages
    product = "parallel.pipeline" if parallel.virtual_stages == 1 else "parallel.pipeline x parallel.virtual_stages"
    if parallel.pipeline > layers:
        text = f"={parallel.pipeline} is more than model.num_hidden_layers={layers}; use at most {layers}"
        yield Fault(("parallel", "pipeline"), text)
    elif stages > layers:
        most = layers // parallel.pipeline
        fewer = layers // parallel.virtual_stages
        others = [f"parallel.pipeline={fewer}"] * (fewer > 0) + [
            "parallel.virtual_stages=1 with schedule 1f1b or zb_h1"
        ]
        fix = f"use at most {most}" if most > 1 else f"use {', or '.join(others)}"
        text = f"={parallel.virtual_stages} x parallel.pipeline={parallel.pipeline} is {stages} stages, more than"
        yield Fault(("parallel", "virtual_stages"), f"{text} model.num_hidden_layers={layers}; {fix}")
    elif parallel.stage_layers is not None:
        given = parallel.stage_layers
        if len(given) != stages or sum(given) != layers:
            text = f"={show(given)} is {len(given)} stages of {sum(given)} layers"
            allowed = f"write {product}={stages} numbers that sum to model.num_hidden_layers={layers}"
            yield Fault(("parallel", "stage_layers"), f"{text}; {allowed}")


def _schedule_faults(config: "RunConfig") -> Iterator[Fault]:
    """Find batches, those of a ramp-up too, whose microbatches the schedule cannot run."""
    parallel, train = config.parallel, config.train
    ramp = train.batch_size_rampup
    sizes = range(train.global_batch_size, train.global_batch_size + 1)
    if ramp is not None:
        sizes = range(ramp.start, train.global_batch_size + 1, ramp.increment)
    for size in sizes:
        microbatches = size // (train.micro_batch_size * config.layout.data)
        if found := refusal(parallel.schedule, parallel.pipeline, parallel.virtual_stages, microbatches):
            key, _, rest = found.partition("=")
            where = "train.global_batch_size" if size == train.global_batch_size else "train.batch_size_rampup"
            batch = f" a step ({where} has steps of {size} sequences)" if "microbatches" in rest else ""
            yield Fault(tuple(key.split(".")), f"={rest}{batch}")
            return


def _world_faults(layout: ParallelLayout, world_size: int | None) -> Iterator[Fault]:
    if world_size is None or world_size == layout.world_size:
        return
    replica = layout.tensor * layout.pipeline
    fix = f"start {alternatives(_multiples_near(world_size, replica))}"
    if world_size % replica == 0:
        fix = f"start {layout.world_size}, or write parallel.data=auto"
    text = f"={layout.tensor} x parallel.pipeline={layout.pipeline} x data parallel {layout.data}"
    yield Fault(("parallel", "tensor"), f"{text} is {layout.world_size} ranks, but {world_size} were started; {fix}")


def _multiples_near(size: int, factor: int) -> list[int]:
    below = size // factor * factor
    return [multiple for multiple in (below, below + factor) if multiple]


def _batch_faults(train: TrainSection, data_size: int) -> Iterator[Fault]:
    step, batch = train.micro_batch_size * data_size, train.global_batch_size
    if batch % step:
        text = f"={train.micro_batch_size} x data parallel {data_size} does not divide train.global_batch_size={batch}"
        yield Fault(
            ("train", "micro_batch_size"), f"{text}; use a global batch of {alternatives(_multiples_near(batch, step))}"
        )
    ramp = train.batch_size_rampup
    for name, size in (("start", ramp.start), ("increment", ramp.increment)) if ramp is not None else ():
        if size % step:
            text = f"={size} is no multiple of train.micro_batch_size={train.micro_batch_size} x data parallel"
            fix = alternatives(_multiples_near(size, step))
            yield Fault(("train", "batch_size_rampup", name), f"{text} {data_size}; use {fix}")


def _deepspeed_faults(config: RunConfig) -> Iterator[Fault]:
    if config.precision != "fp32" and config.zero_stage == 0:
        text = f"=0 is refused with {config.precision}: DeepSpeed's optimizer drifts there; use stage 1, 2 or 3"
        yield Fault(("zero_optimization", "stage"), text)
    for section in config.deepspeed.on_nvme if config.checkpoint.every else ():
        text = f"='nvme' does not go with checkpoint.every={config.checkpoint.every}: a checkpoint reads the state in "
        text += "memory; write 'cpu', or checkpoint.every=0"
        yield Fault(("zero_optimization", section, "device"), text)
    train = config.train
    microbatches, rest = divmod(train.global_batch_size, train.micro_batch_size * config.layout.data)
    values = {
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.global_batch_size/(train.micro_batch_size x data parallel)": None if rest else microbatches,
        "model.vocab_size": config.model.vocab_size,
        "parallel.pipeline": config.parallel.pipeline,
    }
    yield from config.deepspeed.disagreements(values, config.origin.file)
