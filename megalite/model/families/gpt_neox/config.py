"""The section `model` of GPT-NeoX and Pythia."""

from collections.abc import Iterator
from math import ceil
from typing import Annotated, Literal

from pydantic import Field

from megalite.model.config import RotaryConfig
from megalite.settings.section import Count, Flag, PositiveNumber, Share
from megalite.settings.validation import Fault, alternatives, show
from megalite.settings.values import choice


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
        found = [*super().faults(), *self.grouping_faults()]
        yield from found
        turned, width = self.rotary_dim, self.head_dim
        if (turned % 2 or not turned) and not found:
            even = [dims for dims in (turned - 1, turned + 1 + (not turned)) if 0 < dims <= width]
            # Rounded up: the dims are rounded down.
            fix = alternatives(ceil(dims / width * 1e4) / 1e4 for dims in even) or "an even model.head_dim"
            text = f"={show(self.rotary_pct)} turns {turned} of model.head_dim={width}, and rotary positions turn pairs"
            yield Fault(("rotary_pct",), f"{text}; use {fix}")
