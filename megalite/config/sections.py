"""The sections of the run file: what each key may hold, and what is wrong between the keys of one section."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic.fields import FieldInfo

from megalite.deepspeed_json import AdamW
from megalite.faults import (
    BETAS,
    FLAG,
    NOT_NEGATIVE,
    POSITIVE,
    TEXT,
    Fault,
    FaultsError,
    Kind,
    alternatives,
    choice,
    show,
    whole,
)

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
        return {key: value for key, value in given.items() if value is not None or key not in fields_of(cls)}

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
            fix = f"use {alternatives(divisors(hidden))}, or give model.head_dim"
            yield Fault(("num_attention_heads",), f"={heads} does not divide model.hidden_size={hidden}; {fix}")
        if heads % groups:
            text = f"={groups} does not divide model.num_attention_heads={heads}; use {alternatives(divisors(heads))}"
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
ARCHITECTURES: dict[str, type[ModelConfig]] = {"llama": LlamaConfig, "gpt2": GPT2Config}


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the fields of a section by the keys that stand for them."""
    return {info.alias or name: info for name, info in section.model_fields.items() if name != "origin"}


def divisors(size: int) -> list[int]:
    """Return what divides `size`, from 1 on."""
    return [divisor for divisor in range(1, size + 1) if size % divisor == 0]
