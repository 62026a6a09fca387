"""The section `model` of Llama, and of Mistral, Qwen2 and Qwen3."""

from collections.abc import Iterator
from typing import Literal

from megalite.model.config import RopeScaling, RotaryConfig
from megalite.settings.section import Flag, PositiveNumber
from megalite.settings.validation import Fault


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
