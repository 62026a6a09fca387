"""The outcome of an optimizer step, for any engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The outcome of one optimizer step."""

    grad_norm: float
    """The global norm of the gradients, before clipping."""
    skipped: bool
    """Whether the update was skipped because the norm is not finite."""
    loss_scale: float | None
    """The loss scale of the step; None without fp16."""
