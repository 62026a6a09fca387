"""What one finished training step came to."""

from dataclasses import dataclass

from megalite.optim.outcome import StepOutcome
from megalite.training.loss_spikes import Spike


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished training step: the mean loss of the global batch, the same on every rank, and the step's outcome."""

    step: int
    loss: float
    outcome: StepOutcome
    learning_rate: float
    samples: int
    consumed_samples: int
    """Up to this step and with it."""
    seconds: float
    own_seconds: float
    """Of these, what this rank was at work itself on forwards and backwards."""
    data_seconds: float
    """Of these, what this rank waited for its batch."""
    spike: Spike | None = None
    """What its loss is, where that is a jump."""
