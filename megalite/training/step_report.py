"""The report of a finished training step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megalite.optim.outcome import StepOutcome
from megalite.training.loss_spikes import Spike


@dataclass(frozen=True, slots=True)
class StepReport:
    """The result of one training step; `loss` is the mean over the global batch, the same on every rank."""

    step: int
    loss: float
    outcome: StepOutcome
    learning_rate: float
    samples: int
    consumed_samples: int
    """Samples consumed up to and including this step."""
    seconds: float
    compute_seconds: float
    """The part of `seconds` in which this rank computed forwards and backwards."""
    data_seconds: float
    """The part of `seconds` in which this rank waited for its batch."""
    spike: Spike | None = None
    """The loss spike, if the step has one."""
    other_losses: Mapping[str, float] = field(default_factory=dict)
    """The further losses of the objective by name, such as a router's."""
