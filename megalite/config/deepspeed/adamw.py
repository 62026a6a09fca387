"""AdamW's settings as the DeepSpeed JSON states them, and DeepSpeed's defaults for them."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AdamW:
    """AdamW's settings (arXiv 1711.05101), with megalite's defaults: what an "auto" stands for."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def plain(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return asdict(self) | {"betas": list(self.betas)}


DEEPSPEED_ADAMW = AdamW(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
"""What DeepSpeed takes for the parameters that a JSON's optimizer section leaves out."""
