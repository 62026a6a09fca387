"""What one optimizer step did, whatever the engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one optimizer step did: the gradient's global norm before clipping, whether the step was skipped because
    that is not finite, and the loss scale it ran with (None without fp16)."""

    grad_norm: float
    skipped: bool
    loss_scale: float | None
