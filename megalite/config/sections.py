"""The sections of the run file: what each key may hold, and what is wrong between the keys of one section."""

from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter

from megalite.config.deepspeed.rules import PRECISION_NAMES, Precision
from megalite.config.section import (
    COUNT,
    COUNT_OR_AUTO,
    COUNTS,
    Count,
    Dropout,
    FilePath,
    Flag,
    Index,
    Number,
    PositiveNumber,
    Section,
    Share,
    divisors,
)
from megalite.config.validation import Fault, alternatives, show
from megalite.config.values import BETAS, POSITIVE, TEXT, choice, number, whole
from megalite.optim.declaration import OptimizerDeclaration
from megalite.optim.registry import OPTIMIZERS
from megalite.parallel.layout import AXES, Axis, ParallelLayout
from megalite.pipeline.schedules import SCHEDULES

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
LAYERS = whole(1, 10_000)
ON_ERROR = choice("stop", "continue")
PRECISION = choice("fp32", "bf16", "fp16", other_names=PRECISION_NAMES)
RECOMPUTE = choice("none", "selective", "full", other_names={"all": "full", "off": "none", "no": "none"})
ROPE_TYPE = choice("linear", "llama3")

OPTIMIZER = choice(*OPTIMIZERS, other_names=dict.fromkeys(("adam", "adamw_torch", "adamw_torch_fused"), "adamw"))


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
    num_hidden_layers: Annotated[int, LAYERS]
    num_attention_heads: Count
    num_key_value_heads: Count = Field(default_factory=lambda given: given["num_attention_heads"])
    """Heads of keys and values; fewer than the query heads is grouped-query attention (arXiv 2305.13245)."""
    head_dim: Count = Field(default_factory=lambda given: given["hidden_size"] // given["num_attention_heads"])
    intermediate_size: Count
    max_position_embeddings: Count
    tie_word_embeddings: Flag = False
    initializer_range: PositiveNumber = 0.02
    attention_dropout: Dropout = 0.0
    """Share of attention's probabilities that training drops."""
    hidden_dropout: Dropout = 0.0
    """Share that training drops of the embedding and of what each branch adds to the residual stream."""

    def faults(self) -> Iterator[Fault]:
        heads, groups, hidden = self.num_attention_heads, self.num_key_value_heads, self.hidden_size
        if "head_dim" not in self.model_fields_set and hidden % heads:
            fix = f"use {alternatives(divisors(hidden))}, or give model.head_dim"
            yield Fault(("num_attention_heads",), f"={heads} does not divide model.hidden_size={hidden}; {fix}")
        if heads % groups:
            text = f"={groups} does not divide model.num_attention_heads={heads}; use {alternatives(divisors(heads))}"
            yield Fault(("num_key_value_heads",), text)


class RopeScaling(Section, frozen=True):
    """Slower rotary positions, for sequences longer than those that a model was first trained on.

    ``linear`` turns by a `factor` less everywhere (arXiv:2306.15595). ``llama3`` does so where a pair of dims turns
    less than `low_freq_factor` times over the original positions, leaves those alone that turn more than
    `high_freq_factor` times, and blends in between (arXiv:2407.21783).
    """

    rope_type: Annotated[Literal["linear", "llama3"], ROPE_TYPE]
    factor: Annotated[float, number(1)]
    low_freq_factor: PositiveNumber | None = None
    high_freq_factor: PositiveNumber | None = None
    original_max_position_embeddings: Count | None = None
    """The positions that the model was first trained on."""

    def faults(self) -> Iterator[Fault]:
        llama3 = {
            "low_freq_factor": POSITIVE.words,
            "high_freq_factor": POSITIVE.words,
            "original_max_position_embeddings": COUNT.words,
        }
        for name, words in llama3.items():
            value = getattr(self, name)
            if self.rope_type == "llama3" and value is None:
                yield Fault((name,), f" is missing; llama3 needs it: {words}")
            if self.rope_type == "linear" and value is not None:
                yield Fault((name,), f"={show(value)} belongs to llama3, not to linear; leave it out")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.rope_type == "llama3" and low is not None and high is not None and low >= high:
            text = f"={show(high)} is not above model.rope_scaling.low_freq_factor={show(low)}"
            yield Fault(("high_freq_factor",), f"{text}; use more, as Llama 3.1 has 4 above 1")


class RotaryConfig(ModelConfig, frozen=True):
    """What an architecture with rotary positions has (arXiv:2104.09864)."""

    rope_theta: PositiveNumber = 10000.0

    @property
    def rotary_dim(self) -> int:
        """How many dims of a head turn with the position, in pairs; its first ones."""
        return self.head_dim


class LlamaConfig(RotaryConfig, frozen=True):
    """The Llama family: RMSNorm, rotary positions, SwiGLU, grouped-query attention (arXiv 2302.13971)."""

    architecture: Literal["llama"]
    rms_norm_eps: PositiveNumber = 1e-5
    rope_scaling: RopeScaling | None = None
    """Rotary positions stretched over longer sequences, as in Llama 3.1."""
    attention_bias: Flag = False
    """A bias on q, k and v, as in Qwen2."""
    attention_output_bias: Flag = False
    """A bias on the output projection of attention; what Hugging Face calls attention_bias in Llama has both."""
    mlp_bias: Flag = False
    """A bias on gate, up and down."""
    qk_norm: Flag = False
    """An RMSNorm over each head of q and k before they turn, as in Qwen3 (arXiv:2505.09388)."""

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
        yield from _grouping_faults(self)


class GPTNeoXConfig(RotaryConfig, frozen=True):
    """The GPT-NeoX family, Pythia too: LayerNorm, partly rotary heads, GELU, biases, a parallel residual.

    arXiv:2204.06745.
    """

    architecture: Literal["gpt_neox"]
    intermediate_size: Count = Field(default_factory=lambda given: 4 * given["hidden_size"])
    layer_norm_eps: PositiveNumber = 1e-5
    rotary_pct: Share = 0.25
    """The share of a head's dims that turn with the position; the others know none."""
    use_parallel_residual: Flag = True
    """Attention and MLP read the same residual stream; if false, the MLP reads it after attention."""
    hidden_act: Annotated[Literal["gelu", "gelu_tanh"], choice("gelu", "gelu_tanh")] = "gelu"
    """GELU in its exact form, or with tanh in the place of the error function (arXiv:1606.08415)."""
    attention_bias: Flag = True
    """A bias on q, k, v and the output projection."""

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct)

    def faults(self) -> Iterator[Fault]:
        found = [*super().faults(), *_grouping_faults(self)]
        yield from found
        turned, width = self.rotary_dim, self.head_dim
        if (turned % 2 or not turned) and not found:
            even = [dims for dims in (turned - 1, turned + 1 + (not turned)) if 0 < dims <= width]
            # Rounded up: the dims are rounded down.
            fix = alternatives(ceil(dims / width * 1e4) / 1e4 for dims in even) or "an even model.head_dim"
            text = f"={show(self.rotary_pct)} turns {turned} of model.head_dim={width}, and rotary positions turn pairs"
            yield Fault(("rotary_pct",), f"{text}; use {fix}")


def _grouping_faults(model: ModelConfig) -> Iterator[Fault]:
    """Find the grouped queries of an architecture that has none."""
    if model.num_key_value_heads != model.num_attention_heads:
        text = f"={model.num_key_value_heads} is not model.num_attention_heads={model.num_attention_heads}"
        text += f"; {model.architecture} groups no queries: leave it out, or use llama"
        yield Fault(("num_key_value_heads",), text)


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


Model = Annotated[LlamaConfig | GPT2Config | GPTNeoXConfig, Field(discriminator="architecture")]
ARCHITECTURES: dict[str, type[ModelConfig]] = {"llama": LlamaConfig, "gpt2": GPT2Config, "gpt_neox": GPTNeoXConfig}
FAMILIES: dict[str, str] = {
    **dict.fromkeys(("llama2", "llama3", "mistral", "qwen2", "qwen3", "llamaforcausallm"), "llama"),
    **dict.fromkeys(("mistralforcausallm", "qwen2forcausallm", "qwen3forcausallm"), "llama"),
    **dict.fromkeys(("gptneox", "pythia", "gptneoxforcausallm"), "gpt_neox"),
    "gpt2lmheadmodel": "gpt2",
}
"""Names of models and of their classes in transformers, with the architecture that computes them."""


def read_model(section: Mapping[str, object]) -> ModelConfig:
    """Return a section `model` as its dataclass; raise ValueError for what it cannot be."""
    return TypeAdapter(Model).validate_python(dict(section))
