"""Which activations a backward computes anew instead of keeping them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Recompute:
    """What is recomputed in the backward.

    ``full`` keeps the input of a layer and recomputes the layer from it (arXiv:1604.06174); ``selective`` recomputes
    attention's scores alone, which take memory by the square of the sequence and little time (arXiv:2205.05198).
    """

    mode: Literal["selective", "full"]
    every: int = 1
    """With ``full`` one layer in so many is recomputed, by its number in the model; the others keep what they make."""
    segment: int = 1
    """With ``full`` so many neighbouring layers of a stage are recomputed from one kept input."""
    partition: bool = False
    """Each tensor rank keeps a share of a kept input, and the shares are gathered for the backward."""
    cpu: bool = False
    """Kept inputs wait in host memory."""
