"""The run file: typed, frozen, validated, and every fault in it told at once.

``load_run_config`` reads YAML, dotted overrides and the DeepSpeed JSON; it checks each value and each section.
``RunConfig.resolve`` knows the number of ranks and the tokenizer's vocabulary, and checks how the sections fit
together. Whatever is wrong becomes one `UserError`: a line a fault, in the form *where, what was found, what is
allowed, the nearest fix*. Nothing here imports torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, InstanceOf, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megalite.deepspeed_json import AdamW, DeepSpeedSettings, Precision, read_document, read_json
from megalite.errors import UserError, nearest
from megalite.faults import (
    BETAS,
    FLAG,
    NOT_NEGATIVE,
    POSITIVE,
    TEXT,
    Fault,
    FaultsError,
    Key,
    Kind,
    Origin,
    alternatives,
    choice,
    read_text,
    report,
    show,
    whole,
)
from megalite.layout import ParallelLayout

# -------------------------------------------------------------------------------------------------- kinds of values


def _only(kind: Kind, *values: object, reason: str = "is not available yet") -> Kind:
    return replace(kind, available=values, unavailable_reason=reason)


def _path(value: Any) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError
    return Path(value)


def _counts(value: Any) -> list[int]:
    return [whole(1).read(item) for item in (value if isinstance(value, list | tuple) else (None,))]


def _shares(value: Any) -> list[float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError
    shares = [POSITIVE.read(item) for item in value]
    if abs(sum(shares) - 1) > 1e-9:
        raise ValueError
    return shares


def _count_or_auto(value: Any) -> int | str:
    return value if value == "auto" else COUNT.read(value)


PATH = Kind("a path", _path)
COUNTS = Kind("a list of integers of at least 1", _counts)
SHARES = Kind("two shares above 0 that sum to 1, such as [0.99, 0.01]", _shares)
COUNT = whole(1)
COUNT_OR_AUTO = Kind("an integer of at least 1, or 'auto'", _count_or_auto)
INDEX = whole(0)
SCHEDULE = _only(choice("1f1b", "gpipe", "interleaved_1f1b", "zb_h1"), "1f1b", "gpipe")
CURVE = choice("cosine", "linear", "constant", "wsd")
CHECKPOINT_EVERY = _only(INDEX, 0, reason="asks for checkpoints, which cannot be written yet")
RESUME = _only(TEXT, "auto", "never", reason="asks for a checkpoint, which cannot be read yet")

Count = Annotated[int, COUNT]
Index = Annotated[int, INDEX]
Flag = Annotated[bool, FLAG]
PositiveNumber = Annotated[float, POSITIVE]
Number = Annotated[float, NOT_NEGATIVE]
FilePath = Annotated[Path, PATH]

_ADAMW = AdamW()


# --------------------------------------------------------------------------------------------------------- sections


class Section(BaseModel, frozen=True, extra="forbid"):
    """A section of the run file: a key that is not a field is an error, and null means not given."""

    def faults(self) -> Iterator[Fault]:
        """Find what is wrong between the section's own keys; `Fault.key` is relative to the section."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {key: value for key, value in given.items() if value is not None or key not in _fields(cls)}

    @model_validator(mode="after")
    def _raise_faults(self) -> "Section":
        if found := list(self.faults()):
            raise FaultsError(found)
        return self


class RunSection(Section, frozen=True):
    """Where the run writes, and the seed that its weights and its sample order follow from."""

    dir: FilePath
    seed: Index = 1234


class ModelConfig(Section, frozen=True):
    """What every architecture has, under the names of Hugging Face."""

    architecture: str
    vocab_size: Count | None = None
    """Taken from the tokenizer unless given; padding to the tensor axis is internal."""
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count = Field(default_factory=lambda given: given["num_attention_heads"])
    """Heads of keys and values; fewer than the query heads is grouped-query attention (arXiv 2305.13245)."""
    head_dim: Count = Field(default_factory=lambda given: given["hidden_size"] // given["num_attention_heads"])
    intermediate_size: Count
    max_position_embeddings: Count
    tie_word_embeddings: Flag = False
    initializer_range: PositiveNumber = 0.02

    def faults(self) -> Iterator[Fault]:
        heads, groups, hidden = self.num_attention_heads, self.num_key_value_heads, self.hidden_size
        if "head_dim" not in self.model_fields_set and hidden % heads:
            fix = f"use {alternatives(_divisors(hidden))}, or give model.head_dim"
            yield Fault(("num_attention_heads",), f"={heads} does not divide model.hidden_size={hidden}; {fix}")
        if heads % groups:
            text = f"={groups} does not divide model.num_attention_heads={heads}; use {alternatives(_divisors(heads))}"
            yield Fault(("num_key_value_heads",), text)


class LlamaConfig(ModelConfig, frozen=True):
    """The Llama family: RMSNorm, rotary positions, SwiGLU, grouped-query attention (arXiv 2302.13971)."""

    architecture: Literal["llama"]
    rms_norm_eps: PositiveNumber = 1e-5
    rope_theta: PositiveNumber = 10000.0
    attention_bias: Flag = False
    """A bias on q, k and v, as in Qwen2; the output projection never has one."""

    def faults(self) -> Iterator[Fault]:
        found = list(super().faults())
        yield from found
        if self.head_dim % 2 and not found:
            text = f"={self.head_dim} is odd, and rotary positions turn pairs; use {self.head_dim + 1}"
            yield Fault(("head_dim",), text)


class GPT2Config(ModelConfig, frozen=True):
    """The GPT-2 family: LayerNorm, learned positions, GELU, biases, tied embeddings unless told otherwise."""

    architecture: Literal["gpt2"]
    intermediate_size: Count = Field(default_factory=lambda given: 4 * given["hidden_size"])
    tie_word_embeddings: Flag = True
    layer_norm_epsilon: PositiveNumber = 1e-5

    def faults(self) -> Iterator[Fault]:
        yield from super().faults()
        if self.num_key_value_heads != self.num_attention_heads:
            text = f"={self.num_key_value_heads} is not model.num_attention_heads={self.num_attention_heads}"
            yield Fault(("num_key_value_heads",), f"{text}; gpt2 groups no queries: leave it out, or use llama")


class DataSource(Section, frozen=True):
    """One tokenised corpus: PREFIX.bin and PREFIX.idx."""

    prefix: FilePath
    weight: PositiveNumber = 1.0


class DataSection(Section, frozen=True):
    """What is trained on, in sequences of `sequence_length` tokens."""

    tokenizer: FilePath | None = None
    sequence_length: Count
    train: tuple[DataSource, ...]
    valid: tuple[DataSource, ...] = ()
    split: Annotated[tuple[float, float], SHARES] | None = None
    """Shares of the training source's documents that train and validate; instead of `valid`."""

    def faults(self) -> Iterator[Fault]:
        for name, sources, allowed in (("train", self.train, (1,)), ("valid", self.valid, (0, 1))):
            if len(sources) not in allowed:
                yield Fault((name,), f" has {len(sources)} sources; one source for now: write one")
        if self.valid and self.split:
            yield Fault(("split",), f"={show(self.split)} stands beside data.valid; keep one of them")

    @property
    def has_validation(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.valid) or self.split is not None


class ParallelSection(Section, frozen=True):
    """The layout of the ranks, and how the pipeline is scheduled."""

    tensor: Count = 1
    pipeline: Count = 1
    data: Annotated[int | Literal["auto"], COUNT_OR_AUTO] = "auto"
    """"auto": as many replicas as the ranks allow."""
    schedule: Annotated[Literal["gpipe", "1f1b"], SCHEDULE] = "1f1b"
    virtual_stages: Annotated[int, _only(COUNT, 1)] = 1
    sequence_parallel: Annotated[bool, _only(FLAG, False)] = False
    stage_layers: Annotated[tuple[int, ...], COUNTS] | None = None
    """Layers of each pipeline stage; evenly shared unless given."""


class OptimizerSection(Section, frozen=True):
    """AdamW (arXiv 1711.05101); norms and biases never decay."""

    name: Annotated[Literal["adamw"], choice("adamw")] = "adamw"
    lr: PositiveNumber = _ADAMW.lr
    betas: Annotated[tuple[float, float], BETAS] = _ADAMW.betas
    eps: PositiveNumber = _ADAMW.eps
    weight_decay: Number = _ADAMW.weight_decay


class ScheduleSection(Section, frozen=True):
    """The learning rate over the steps: linear warm-up, then the named curve down to `min_lr`."""

    name: Annotated[Literal["cosine", "linear", "constant", "wsd"], CURVE] = "cosine"
    warmup_steps: Index = 0
    min_lr: Number = 0.0
    decay_steps: Count | None = None
    """Length of the final decay of wsd: warm-up, stable, decay (arXiv 2404.06395)."""

    def faults(self) -> Iterator[Fault]:
        if self.name == "wsd" and self.decay_steps is None:
            yield Fault(("decay_steps",), f" is missing; wsd needs the length of its final decay: {COUNT.words}")
        if self.name != "wsd" and self.decay_steps is not None:
            yield Fault(("decay_steps",), f"={self.decay_steps} belongs to wsd, not to {self.name}; leave it out")


class TrainSection(Section, frozen=True):
    """How long and in what batches; a batch is counted in sequences."""

    steps: Count
    global_batch_size: Count
    micro_batch_size: Count
    optimizer: OptimizerSection | None = None
    schedule: ScheduleSection | None = None
    eval_every: Index = 0
    """Steps between evaluations; 0 means never."""
    eval_batches: Count = 8
    """Global batches an evaluation reads."""
    stop_after: Count | None = None
    """End after this step, with the schedules still those of `steps`."""
    trace_steps: Annotated[tuple[int, ...], COUNTS] = ()
    """Steps whose pipeline timeline is recorded; the first step is 1."""
    timeout_seconds: Count = 1800
    """How long a rank waits for a lost peer."""

    def faults(self) -> Iterator[Fault]:
        beyond = [("stop_after", self.stop_after or 0), ("trace_steps", max(self.trace_steps, default=0))]
        for name, step in beyond:
            if step > self.steps:
                yield Fault((name,), f"={step} is beyond train.steps={self.steps}; use at most {self.steps}")
        if self.schedule is not None:
            shaped = self.schedule.warmup_steps + (self.schedule.decay_steps or 0)
            if shaped > self.steps:
                names = "warmup_steps" if self.schedule.decay_steps is None else "warmup_steps + decay_steps"
                text = f".{names}={shaped} is more than train.steps={self.steps}; use at most {self.steps}"
                yield Fault(("schedule",), text)


class CheckpointSection(Section, frozen=True):
    """Checkpoints, which cannot be written yet."""

    every: Annotated[int, CHECKPOINT_EVERY] = 0
    keep_last: Count | None = None
    asynchronous: Annotated[bool, _only(FLAG, False)] = Field(default=False, alias="async")


Model = Annotated[LlamaConfig | GPT2Config, Field(discriminator="architecture")]
_ARCHITECTURES: dict[str, type[ModelConfig]] = {"llama": LlamaConfig, "gpt2": GPT2Config}


# ---------------------------------------------------------------------------------------------------------- the whole


class RunConfig(Section, frozen=True):
    """A whole run; made by `load_run_config`, complete after `resolve`."""

    run: RunSection
    model: Model
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    resume: Annotated[str, RESUME] = "auto"
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
        return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# ---------------------------------------------------------------------------------------------- how sections fit


def _divisors(size: int) -> list[int]:
    return [divisor for divisor in range(1, size + 1) if size % divisor == 0]


def _fit_faults(config: RunConfig, world_size: int | None, vocab_size: int | None) -> Iterator[Fault]:
    yield from _vocabulary_faults(config.model, vocab_size)
    yield from _tensor_faults(config.model, config.parallel.tensor)
    yield from _pipeline_faults(config.model, config.parallel)
    if found := list(_world_faults(config.layout, world_size)):
        yield from found
    else:
        yield from _batch_faults(config.train, config.layout.data)
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
    """Find the first rule that the tensor axis breaks; the sizes offered instead break none."""
    allowed = [size for size in _divisors(model.num_attention_heads) if _tensor_rule(model, size) is None]
    if broken := _tensor_rule(model, tensor):
        yield Fault(("parallel", "tensor"), f"={tensor} {broken}; use {alternatives(allowed)}")


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


def _pipeline_faults(model: ModelConfig, parallel: ParallelSection) -> Iterator[Fault]:
    layers, stages = model.num_hidden_layers, parallel.pipeline
    if stages > layers:
        text = f"={stages} is more than model.num_hidden_layers={layers}; use at most {layers}"
        yield Fault(("parallel", "pipeline"), text)
    elif parallel.stage_layers is not None:
        given = parallel.stage_layers
        if len(given) != stages or sum(given) != layers:
            text = f"={show(given)} is {len(given)} stages of {sum(given)} layers"
            allowed = f"write parallel.pipeline={stages} numbers that sum to model.num_hidden_layers={layers}"
            yield Fault(("parallel", "stage_layers"), f"{text}; {allowed}")


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


def _deepspeed_faults(config: RunConfig) -> Iterator[Fault]:
    if config.precision != "fp32" and config.zero_stage == 0:
        text = f"=0 is refused with {config.precision}: DeepSpeed's optimizer drifts there; use stage 1, 2 or 3"
        yield Fault(("zero_optimization", "stage"), text)
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


# ---------------------------------------------------------------------------------------------------------- loading


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, with the DeepSpeed JSON that it names and ``section.key=value`` overrides.

    An override's value is YAML, and its key may reach into the JSON: ``deepspeed.zero_optimization.stage=2``. The
    JSON's path is relative to the working directory.

    Raises:
        UserError: a file that is missing or cannot be parsed; keys, types or values that are not allowed; all of them
            at once, a line each.
    """
    document = _read_yaml(path)
    given = _parse_overrides(overrides)
    origin = Origin(path.name, overrides=tuple(key for key, _ in given))
    for key, value in given:
        if key == ("deepspeed",):
            document["deepspeed"] = value
    deepspeed_origin = _load_deepspeed(document, origin, path.parent)
    report([line for key, value in given if key != ("deepspeed",) and (line := _assign(document, key, value))])
    return _validate(document, origin, deepspeed_origin)


def _parse_overrides(overrides: Iterable[str]) -> list[tuple[tuple[str, ...], Any]]:
    parsed: list[tuple[tuple[str, ...], Any]] = []
    lines: list[str] = []
    for text in overrides:
        key, _, value = text.partition("=")
        if not re.fullmatch(r"[a-z_]\w*(\.\w+)*=.*", text, re.DOTALL | re.IGNORECASE):
            lines.append(f"command line: {text!r} is not an override; write section.key=value")
            continue
        try:
            parsed.append((tuple(key.split(".")), yaml.load(value, _Loader)))  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            lines.append(f"command line: {key}={value!r} is not YAML: {_yaml_problem(error)}")
    report(lines)
    return parsed


def _assign(document: dict[str, Any], key: tuple[str, ...], value: Any) -> str | None:
    """Put a value where the dotted key says, making sections on the way; return a message where that cannot be."""
    node: Any = document
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            place: Any = int(part)
        elif isinstance(node, dict):
            place = part
        else:
            shown = f"{'.'.join(key[:depth])}={show(node)}"
            return f"command line: {'.'.join(key)} reaches into {shown}, which has no {part!r}"
        if last:
            node[place] = value
        elif isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]
    return None


def _load_deepspeed(document: dict[str, Any], origin: Origin, folder: Path) -> Origin:
    """Put the JSON's content in the place of its path; return where that content stands."""
    within = replace(origin, section=("deepspeed",))
    stated = document.get("deepspeed")
    if stated is None or isinstance(stated, Mapping):
        document["deepspeed"] = dict(stated or {})
        return within
    if not isinstance(stated, str):
        raise UserError(origin.line(Fault(("deepspeed",), f"={show(stated)} is neither a path nor a section")))
    path = Path(stated)
    if not path.is_file() and (folder / path).is_file():
        text = f"={show(stated)} is relative to the working directory; write {show(str(folder / path))}"
        raise UserError(origin.line(Fault(("deepspeed",), text)))
    document["deepspeed"] = read_json(path)
    # The path may stand on the command line; what the file says does not.
    inside = tuple(key for key in origin.overrides if key != ("deepspeed",))
    return replace(within, file=path.name, own_file=True, overrides=inside)


def _validate(document: dict[str, Any], origin: Origin, deepspeed_origin: Origin) -> RunConfig:
    settings, json_faults = read_document(document["deepspeed"])
    lines = [deepspeed_origin.line(fault) for fault in json_faults]
    if "origin" in document:
        lines.append(origin.line(Fault(("origin",), _unknown("origin", RunConfig))))
    deepspeed = DeepSpeedSettings({} if json_faults else settings, deepspeed_origin)
    try:
        config = RunConfig.model_validate({**document, "deepspeed": deepspeed, "origin": origin})
    except ValidationError as error:
        found = [origin.line(fault) for details in error.errors(include_url=False) for fault in _translate(details)]
        raise UserError("\n".join(dict.fromkeys([*found, *lines]))) from None
    report(lines)
    resolved = deepspeed.resolve_auto(
        hidden_size=config.model.hidden_size, steps=config.train.steps, lr=config.optimizer.lr
    )
    return config.model_copy(update={"deepspeed": resolved})


# --------------------------------------------------------------------------------- pydantic's errors in our words


def _translate(error: ErrorDetails) -> Iterator[Fault]:
    """Turn one of pydantic's errors into ours; its own text, which speaks of Python, is never shown."""
    section, name = _owner(error["loc"])
    key = error["loc"]
    if key[:1] == ("model",) and key[1:2] and key[1] in _ARCHITECTURES:
        key = (key[0], *key[2:])  # pydantic names the member of the union that it tried
    cause = error.get("ctx", {}).get("error")
    match error["type"]:
        case "default_factory_not_called":
            return
        case "value_error" if isinstance(cause, FaultsError):
            yield from (Fault((*key, *fault.key), fault.text) for fault in cause.faults)
        case "value_error":
            yield Fault(key, str(cause))
        case "missing":
            yield Fault(key, f" is missing; write {_words(section, name)}")
        case "extra_forbidden":
            yield Fault(key, _unknown(name, section))
        case "union_tag_not_found":
            yield Fault((*key, "architecture"), f" is missing; write {alternatives(_ARCHITECTURES)}")
        case "union_tag_invalid":
            tag = error["input"]["architecture"]
            yield Fault((*key, "architecture"), f"={show(tag)} is not {alternatives(_ARCHITECTURES)}")
        case _:
            yield Fault(key, f"={show(error['input'])} is not {_words(section, name)}")


def _owner(loc: Key) -> tuple[type[Section], str]:
    """Return the section that an error's last part belongs to, and that part."""
    section: type[Section] = RunConfig
    for part in loc[:-1]:
        if part in _ARCHITECTURES and issubclass(section, ModelConfig):
            section = _ARCHITECTURES[str(part)]
        elif isinstance(part, str):
            section = next(_sections_in(_fields(section)[part].annotation))
    return section, str(loc[-1]) if loc else ""


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _fields(section: type[Section]) -> dict[str, FieldInfo]:
    return {info.alias or name: info for name, info in section.model_fields.items() if name != "origin"}


def _words(section: type[Section], name: str) -> str:
    """Say what a field may hold."""
    info = _fields(section).get(name)
    kinds = [item for item in info.metadata if isinstance(item, Kind)] if info is not None else []
    if kinds:
        return kinds[0].words
    owned = next(_sections_in(info.annotation), None) if info is not None else section
    listed = f"{{{', '.join(_fields(owned))}}}" if owned is not None else "a section"
    several = info is not None and get_origin(info.annotation) is tuple
    return f"a list of {listed}" if several else f"a section {listed}"


def _unknown(name: str, section: type[Section]) -> str:
    return f" is not a key{nearest(name, _fields(section))}"


# ------------------------------------------------------------------------------------------------------------- YAML

_YAML = "tag:yaml.org,2002:"
_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
)
"""YAML 1.2's scalars: in YAML 1.1, PyYAML's, 1e-3 is a text, ``no`` is false and 1:30 is ninety."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, and a key that stands twice is an error."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_YAML}merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _yaml_error(f"the key {show(key)} is not a word", key_node)
            if key in seen:
                raise _yaml_error(f"{key} stands twice in one section; keep one", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml_error(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_YAML}{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first) + [""])


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(read_text(path), _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path.name}: {_yaml_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{path.name}: the file nests too deeply to be read") from None
    if document is None or isinstance(document, dict):
        return dict(document or {})
    raise UserError(f"{path.name}: the file holds {show(document)}; write sections: {', '.join(_fields(RunConfig))}")


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
    return str(error).splitlines()[0]
