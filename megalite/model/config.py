"""The section `model` of a run file: the keys of every family, and those of rotary positions."""

from collections.abc import Hashable, Iterator
from typing import Annotated, Literal

from pydantic import Field

from megalite.settings.section import COUNT, Count, Dropout, Flag, PositiveNumber, Section, divisors
from megalite.settings.validation import Fault, alternatives, show
from megalite.settings.values import POSITIVE, choice, number, whole

LAYERS = whole(1, 10_000)
ROPE_TYPE = choice("linear", "llama3")


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

    def layer_kind(self, layer: int) -> Hashable:
        """Return the kind of a layer: layers of one kind have the same tensors. All are of one kind by default."""
        return None

    def faults(self) -> Iterator[Fault]:
        heads, groups, hidden = self.num_attention_heads, self.num_key_value_heads, self.hidden_size
        if "head_dim" not in self.model_fields_set and hidden % heads:
            fix = f"use {alternatives(divisors(hidden))}, or give model.head_dim"
            yield Fault(("num_attention_heads",), f"={heads} does not divide model.hidden_size={hidden}; {fix}")
        if heads % groups:
            text = f"={groups} does not divide model.num_attention_heads={heads}; use {alternatives(divisors(heads))}"
            yield Fault(("num_key_value_heads",), text)

    def grouping_faults(self) -> Iterator[Fault]:
        """Find grouped queries, for an architecture that has none."""
        if self.num_key_value_heads != self.num_attention_heads:
            text = f"={self.num_key_value_heads} is not model.num_attention_heads={self.num_attention_heads}"
            text += f"; {self.architecture} groups no queries: leave it out, or use llama"
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
