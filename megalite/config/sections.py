"""The sections of the run file: what each key may hold, and what is wrong between the keys of one section."""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megalite.config.deepspeed.rules import PRECISION_NAMES, Precision
from megalite.config.registered import CALLBACK_NAMES, LOSS
from megalite.model.config import ModelConfig
from megalite.model.registry import FAMILIES, read_model
from megalite.optim.declaration import OptimizerDeclaration
from megalite.optim.registry import OPTIMIZERS
from megalite.parallel.layout import AXES, Axis, ParallelLayout
from megalite.pipeline.schedules import SCHEDULES
from megalite.settings.section import (
    COUNT,
    COUNT_OR_AUTO,
    COUNTS,
    Count,
    FilePath,
    Flag,
    Index,
    Number,
    PositiveNumber,
    Section,
    divisors,
    sections_in,
)
from megalite.settings.validation import Fault, alternatives, show
from megalite.settings.values import BETAS, TEXT, choice, number, whole

SCHEDULE = choice(*SCHEDULES)
CURVE = choice(
    *("cosine", "linear", "constant", "wsd"),
    other_names={
        **dict.fromkeys(("cosine_with_min_lr", "cosine_decay", "warmup_cosine", "warmupcosinelr"), "cosine"),
        **dict.fromkeys(("linear_decay", "warmupdecaylr", "polynomial"), "linear"),
        **dict.fromkeys(("constant_with_warmup", "warmuplr"), "constant"),
        **dict.fromkeys(("warmup_stable_decay", "warmup-stable-decay", "trapezoidal"), "wsd"),
    },
)
ENGINE = choice("auto", "torch", "deepspeed", other_names=dict.fromkeys(("fsdp", "fsdp2"), "torch"))
ON_ERROR = choice("stop", "continue")
PRECISION = choice("fp32", "bf16", "fp16", other_names=PRECISION_NAMES)
RECOMPUTE = choice("none", "selective", "full", other_names={"all": "full", "off": "none", "no": "none"})

OPTIMIZER = choice(*OPTIMIZERS, other_names=dict.fromkeys(("adam", "adamw_torch", "adamw_torch_fused"), "adamw"))


class RunSection(Section, frozen=True):
    """Where the run writes, and the seed that its weights and its sample order follow from."""

    dir: FilePath
    seed: Index = 1234


class ParallelSection(Section, frozen=True):
    """The layout of the ranks, and how the pipeline is scheduled."""

    tensor: Count = 1
    pipeline: Count = 1
    data: Annotated[int | Literal["auto"], COUNT_OR_AUTO] = "auto"
    """"auto": as many replicas as the ranks allow."""
    schedule: Annotated[str, SCHEDULE] = "1f1b"
    virtual_stages: Count = 1
    """Stages that a pipeline rank holds: 2 or more for interleaved_1f1b, 2 for zb_v, else 1."""
    sequence_parallel: Flag = False
    """Between sharded layers each tensor rank holds a share of the tokens (arXiv:2205.05198)."""
    overlap: Flag = False
    """A tensor rank's collectives in the backward run beside the product for the weight's gradient."""
    engine: Annotated[str, ENGINE] = "auto"
    """What divides gradients, optimizer state and weights over the data ranks: torch's FSDP2, or DeepSpeed's ZeRO."""
    stage_layers: Annotated[tuple[int, ...], COUNTS] | None = None
    """Layers of each pipeline stage, virtual ones too, in the model's order; evenly shared unless given."""
    axes: ClassVar[tuple[Axis, ...]] = AXES
    """The axes whose sizes the keys of their names give."""

    def layout(self, data: int) -> ParallelLayout:
        """Return the layout with so many ranks along the data axis."""
        sizes = {axis.name: getattr(self, axis.name) for axis in self.axes}
        return ParallelLayout(axes=self.axes, **sizes | {"data": data})


class ParameterGroupSection(Section, frozen=True):
    """Settings of the parameters whose global names match a pattern, in place of the optimizer's own."""

    match: Annotated[str, TEXT]
    """A glob pattern over global names, as ``layers.0.*``: `*` matches dots too."""
    lr_scale: PositiveNumber | None = None
    """A factor on the learning rate of every step; 1 unless given."""
    weight_decay: Number | None = None
    """The weight decay of the matrices that match; norms and biases never decay."""
    frozen: Flag = False
    """Whether the parameters are not trained: no gradient, no optimizer state."""

    def faults(self) -> Iterator[Fault]:
        stated = [name for name in ("lr_scale", "weight_decay") if getattr(self, name) is not None]
        if self.frozen and stated:
            text = f"={show(getattr(self, stated[0]))} belongs to parameters that are trained, and frozen=true"
            yield Fault((stated[0],), f"{text} stands beside it; keep one of them")
        elif not (self.frozen or stated):
            yield Fault((), " sets nothing for its parameters; write lr_scale, weight_decay or frozen: true")


def _default_of(name: str) -> Callable[[dict[str, Any]], Any]:
    """Return a default factory: the default of a hyperparameter in the optimizer's declaration, None if it has none."""
    return lambda given: OPTIMIZERS[given["name"]].defaults.get(name)


class OptimizerSection(Section, frozen=True):
    """The optimizer, its hyperparameters, and parameter groups; norms and biases never decay."""

    name: Annotated[str, OPTIMIZER] = "adamw"
    lr: PositiveNumber = Field(default_factory=_default_of("lr"))
    betas: Annotated[tuple[float, float], BETAS] = Field(default_factory=_default_of("betas"))
    eps: PositiveNumber | None = Field(default_factory=_default_of("eps"))
    weight_decay: Number = Field(default_factory=_default_of("weight_decay"))
    groups: tuple[ParameterGroupSection, ...] = ()
    """Parameters with other settings, by name; the first group that matches a parameter counts."""

    @property
    def declaration(self) -> OptimizerDeclaration:
        """What the optimizer declares."""
        return OPTIMIZERS[self.name]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters that the optimizer has, by name."""
        return {name: getattr(self, name) for name in self.declaration.defaults}

    @property
    def stated(self) -> dict[str, Any]:
        """The name and the hyperparameters that the run file states, without those that are defaults here."""
        return self.model_dump(include=self.model_fields_set - {"groups"})

    def faults(self) -> Iterator[Fault]:
        for name in ("betas", "eps", "weight_decay"):
            if name in self.model_fields_set and name not in self.declaration.defaults:
                text = f"={show(getattr(self, name))} is no setting of {self.name}; leave it out"
                yield Fault((name,), text)


class ScheduleSection(Section, frozen=True):
    """The learning rate over the steps: linear warm-up, then the named curve down to `min_lr`."""

    name: Annotated[Literal["cosine", "linear", "constant", "wsd"], CURVE] = "cosine"
    warmup_steps: Index = 0
    min_lr: Number | None = None
    """The rate of the last step but under constant; a tenth of the optimizer's lr unless given, so that it trains."""
    decay_steps: Count | None = None
    """Length of the final decay of wsd: warm-up, stable, decay (arXiv 2404.06395)."""

    def lowest(self, lr: float) -> float:
        """Return the rate of the last step under a schedule that decays from `lr`."""
        # Rounded, so that a tenth of 3e-4 is 3e-5 to the last digit.
        return float(f"{lr / 10:.12g}") if self.min_lr is None else self.min_lr

    def resolved(self, lr: float) -> "ScheduleSection":
        """Return the schedule with its `min_lr` written out, where it has a use."""
        return self if self.name == "constant" else self.model_copy(update={"min_lr": self.lowest(lr)})

    def faults(self) -> Iterator[Fault]:
        if self.name == "wsd" and self.decay_steps is None:
            yield Fault(("decay_steps",), f" is missing; wsd needs the length of its final decay: {COUNT.words}")
        if self.name != "wsd" and self.decay_steps is not None:
            yield Fault(("decay_steps",), f"={self.decay_steps} belongs to wsd, not to {self.name}; leave it out")


class RampupSection(Section, frozen=True):
    """A global batch that begins at `start` sequences and grows by `increment` at even shares of `samples`."""

    start: Count
    increment: Count
    samples: Count


class SpikeSection(Section, frozen=True):
    """What becomes of a step whose loss is above `factor` times the median of the `window` steps before it.

    ``warn`` tells of it; ``skip`` drops its update too; ``rollback`` goes back to the newest checkpoint and passes over
    the samples from there to the end of the step (arXiv:2204.02311, section 5.1), at most `max_rollbacks` times.
    """

    factor: Annotated[float, number(above=1)] = 1.5
    window: Count = 100
    action: Annotated[Literal["warn", "skip", "rollback"], choice("warn", "skip", "rollback")] = "warn"
    max_rollbacks: Count = 10


class TrainSection(Section, frozen=True):
    """How long and in what batches; a batch is counted in sequences."""

    steps: Count
    global_batch_size: Count
    micro_batch_size: Count
    precision: Annotated[Precision | None, PRECISION] = None
    """The dtype of parameters and activations. Unless given it is what the DeepSpeed JSON states, else fp32."""
    loss: Annotated[str | None, LOSS] = None
    """A loss that a plugin registers; the cross entropy of the language model unless given."""
    callbacks: Annotated[tuple[str, ...], CALLBACK_NAMES] = ()
    """Callbacks that plugins register, in the order in which they are called."""
    batch_size_rampup: RampupSection | None = None
    """A smaller global batch at the start (arXiv:2005.14165)."""
    optimizer: OptimizerSection | None = None
    schedule: ScheduleSection | None = None
    eval_every: Index = 0
    """Steps between evaluations; 0 means never."""
    eval_batches: Count = 8
    """Global batches an evaluation reads."""
    stop_after: Count | None = None
    """End after this step, with the schedules still those of `steps`."""
    log_every: Count = 1
    """The console shows every so many-th step, and the first and the last; metrics.jsonl has all."""
    trace_steps: Annotated[tuple[int, ...], COUNTS] = ()
    """Steps whose pipeline timeline is recorded; the first step is 1."""
    recompute: Annotated[Literal["none", "selective", "full"] | None, RECOMPUTE] = None
    """Activations that a backward computes anew; full where the DeepSpeed JSON asks for any, and none otherwise."""
    recompute_every: Count = 1
    """With full, one layer in so many is recomputed."""
    compile: Flag = False
    """Layers are compiled by torch.compile, once for all of them."""
    max_bad_steps: Count = 50
    """A step whose gradient is not finite is skipped; so many in a row end the run."""
    spike: SpikeSection | None = None
    """Watch the loss for jumps; no jump is one unless given."""
    timeout_seconds: Annotated[int, whole(1, most=366 * 86400)] = 1800
    """How long a rank in training may stand still, waiting for a lost peer say."""
    max_restarts: Index = 0
    """How often ranks that megalite launched are started again, from the newest checkpoint, when one of them dies."""
    max_minutes: PositiveNumber | None = None
    """So many minutes after its start a rank asks to stop: a checkpoint is saved, and the run can go on later."""
    cpu_products: Literal["native", "fp32"] | None = None
    """How a CPU multiplies 16-bit matrices: natively, or in fp32 with the result rounded; the faster unless given."""
    cpu_attention: Literal["written_out", "fused"] | None = None
    """How a CPU computes attention: as plain matrix products, or by torch's fused kernel; the faster unless given."""
    straggler_factor: Annotated[float, number(above=1)] = 1.5
    """A rank that is at work so many times longer than the median of the ranks with its stages is named."""

    @property
    def last_step(self) -> int:
        """The step that this start ends with, unless it is stopped."""
        return self.stop_after or self.steps

    def faults(self) -> Iterator[Fault]:
        if self.stop_after and self.stop_after > self.steps:
            text = f"={self.stop_after} is beyond train.steps={self.steps}; use at most {self.steps}"
            yield Fault(("stop_after",), text)
        name, last = ("stop_after", self.stop_after) if self.stop_after else ("steps", self.steps)
        traced = max(self.trace_steps, default=0)
        if traced > last:
            yield Fault(("trace_steps",), f"={traced} is beyond train.{name}={last}; use at most {last}")
        if self.batch_size_rampup is not None:
            yield from self._rampup_faults(self.batch_size_rampup)
        if self.schedule is not None:
            shaped = self.schedule.warmup_steps + (self.schedule.decay_steps or 0)
            if shaped > self.steps:
                names = "warmup_steps" if self.schedule.decay_steps is None else "warmup_steps + decay_steps"
                text = f".{names}={shaped} is more than train.steps={self.steps}; use at most {self.steps}"
                yield Fault(("schedule",), text)

    def _rampup_faults(self, ramp: RampupSection) -> Iterator[Fault]:
        whole = self.global_batch_size
        if ramp.start >= whole:
            text = f"={ramp.start} is not below train.global_batch_size={whole}; use less, or leave the ramp-up out"
            yield Fault(("batch_size_rampup", "start"), text)
        elif (whole - ramp.start) % ramp.increment:
            text = f"={ramp.increment} does not divide the {whole - ramp.start} sequences from start to the whole batch"
            fix = alternatives(divisors(whole - ramp.start))
            yield Fault(("batch_size_rampup", "increment"), f"{text}; use {fix}")


class CheckpointSection(Section, frozen=True):
    """When checkpoints are written, into ``checkpoints/`` of the run's folder, and which are kept."""

    every: Index = 0
    """Steps between checkpoints; 0 means none on the way."""
    last: Flag = True
    """The last step has a checkpoint too, whatever makes it the last: `train.steps`, `train.stop_after`, a request to
    stop, or `train.max_minutes`. Without it and with `every` 0 a run leaves no model."""
    keep_last: Count | None = None
    """How many of the newest are kept; all unless given."""
    keep_every: Count | None = None
    """Checkpoints of steps that this divides are kept in any case."""
    asynchronous: Flag = Field(default=False, alias="async")
    """Training goes on while the checkpoint is written, for a copy of the state in host memory."""
    on_error: Annotated[Literal["stop", "continue"], ON_ERROR] = "stop"
    """What a checkpoint that cannot be written does to the run."""

    @property
    def keeps(self) -> bool:
        """Whether a run leaves a checkpoint at all."""
        return self.last or self.every > 0

    def due(self, step: int, last: int) -> bool:
        """Whether `step` ends with a checkpoint, in a run that ends after step `last`."""
        return (self.every > 0 and step % self.every == 0) or (self.last and step == last)

    def faults(self) -> Iterator[Fault]:
        if self.keep_every is not None and self.keep_last is None:
            text = f"={self.keep_every} stands without checkpoint.keep_last, and all are kept; give both, or neither"
            yield Fault(("keep_every",), text)
        elif self.keep_every is not None and self.every and self.keep_every % self.every:
            text = f"={self.keep_every} is no multiple of checkpoint.every={self.every}; use"
            near = self.keep_every // self.every * self.every
            fix = alternatives(step for step in (near, near + self.every) if step)
            yield Fault(("keep_every",), f"{text} {fix}")


class AnyFamily:
    """Reads a section `model` as the configuration of its family, those of plugins too."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        configs = (family.config for family in FAMILIES.values())
        return handler(core_schema.union_schema([config.__pydantic_core_schema__ for config in configs]))

    @staticmethod
    def read(section: Any) -> ModelConfig:
        if not isinstance(section, Mapping | ModelConfig):
            raise PydanticCustomError("no_section", "not a section")
        return read_model(section)


def run_sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections in the annotation of a run file's field; for a section `model` those of all families."""
    for section in sections_in(annotation):
        if section is ModelConfig:
            yield from (family.config for family in FAMILIES.values())
        else:
            yield section
