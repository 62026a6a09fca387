"""The section `model` of GPT-2."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megalite.model.config import ModelConfig
from megalite.settings.section import Count, Flag, PositiveNumber
from megalite.settings.validation import Fault


class GPT2Config(ModelConfig, frozen=True):
    """The GPT-2 family: LayerNorm, learned positions, GELU, biases, tied embeddings unless told otherwise."""

    architecture: Literal["gpt2"]
    intermediate_size: Count = Field(default_factory=lambda given: 4 * given["hidden_size"])
    tie_word_embeddings: Flag = True
    layer_norm_epsilon: PositiveNumber = 1e-5

    def faults(self) -> Iterator[Fault]:
        yield from super().faults()
        yield from self.grouping_faults()
