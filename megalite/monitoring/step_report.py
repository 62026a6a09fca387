"""The report of a finished training step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megalite.config.sections import SpikeSection
from megalite.optim.outcome import StepOutcome
from megalite.pipeline.timeline.spans import Span


@dataclass(frozen=True, slots=True)
class Spike:
    """A loss spike: the `loss` of a step and the `baseline`, the median of the losses before, in nats per token."""

    loss: float
    baseline: float
    rule: SpikeSection

    @property
    def drops_update(self) -> bool:
        """Whether the update of the step is skipped."""
        return self.rule.action != "warn"

    @property
    def rolls_back(self) -> bool:
        """Whether the run rolls back to a checkpoint before the spike."""
        return self.rule.action == "rollback"


@dataclass(frozen=True, slots=True)
class StepReport:
    """The result of one training step; `loss` is the mean over the global batch, the same on every rank."""

    step: int
    loss: float
    outcome: StepOutcome
    """The gradient norm, whether the update was skipped, and the loss scale."""
    learning_rate: float
    samples: range
    """The samples of the step, by their numbers in the order."""
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
    spans: Sequence[Span] = ()
    """When each forward and backward of this rank ran, in a step of `train.trace_steps`."""
