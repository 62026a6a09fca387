"""ParityReport, the result of comparing one layout with the reference: tolerances, differences, descriptions."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

LOSS_TOLERANCE = 1e-5
"""The largest relative difference of the loss."""
NORM_TOLERANCE = 1e-5
"""The largest relative difference of the gradient's global norm."""
START_TOLERANCE = 0.0
"""The weights before the step are drawn from (seed, name), or read: they must be equal to the bit."""
GRADIENT_TOLERANCE = 1e-5
"""The largest norm of a gradient's difference, relative to the norm of the parameter's gradient or to `NOISE_SHARE` of
the global norm, whichever is larger."""
NOISE_SHARE = 1e-2
"""Some gradients are only rounding errors: softmax does not depend on a bias of the keys, for example."""
UPDATE_TOLERANCE = 1e-5
"""The largest difference of a weight after the step, beyond its own rounding, relative to the learning rate."""


@dataclass(frozen=True, slots=True)
class ParameterDifference:
    """The difference of a parameter from the reference, on the rank where it is largest.

    `relative` is relative to the same quantity as its tolerance. `factor` is the projection of the values on the
    reference's: 2 if they are twice as large, 0 if they are unrelated.
    """

    index: int
    """The parameter's position in the order of the model, from 0."""
    name: str
    relative: float
    factor: float
    stage: int
    rank: int

    @property
    def location(self) -> str:
        return f"{self.name} on stage {self.stage}, rank {self.rank}"


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """The comparison of one kind of tensor over all parameters and ranks.

    `worst` is the largest difference, `differing` the indices of the parameters beyond the tolerance, and `first` the
    first of them in the order of the model.
    """

    worst: ParameterDifference | None = None
    first: ParameterDifference | None = None
    differing: tuple[int, ...] = ()

    @classmethod
    def of(cls, differences: Sequence[ParameterDifference], tolerance: float) -> "TensorComparison":
        """Summarise the differences of one rank."""
        beyond = [difference for difference in differences if not difference.relative <= tolerance]
        return cls(
            max(differences, key=_severity, default=None),
            min(beyond, key=_precedence, default=None),
            tuple(sorted({difference.index for difference in beyond})),
        )

    @classmethod
    def over_ranks(cls, agreements: Sequence["TensorComparison"]) -> "TensorComparison":
        """Merge the comparisons of all ranks."""
        return cls(
            max((found.worst for found in agreements if found.worst), key=_severity, default=None),
            min((found.first for found in agreements if found.first), key=_precedence, default=None),
            tuple(sorted({index for found in agreements for index in found.differing})),
        )


def _severity(difference: ParameterDifference) -> float:
    return math.inf if math.isnan(difference.relative) else difference.relative


def _precedence(difference: ParameterDifference) -> tuple[int, float]:
    return difference.index, -_severity(difference)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The result of one layout's comparison: losses and global norms of both, comparisons of weights and gradients."""

    parameters: int
    """The number of global tensors in the model."""
    elements_missing: int
    """Elements updated by no rank minus elements updated by more than one (0 when every element has one owner)."""
    loss: float
    reference_loss: float
    norm: float
    reference_norm: float
    start: TensorComparison
    gradients: TensorComparison
    update: TensorComparison
    miscounted: str | None = None
    """The parameter that the global norm leaves out or counts more than once, if one explains its difference."""

    @property
    def loss_difference(self) -> float:
        return _relative(self.loss, self.reference_loss)

    @property
    def norm_difference(self) -> float:
        return _relative(self.norm, self.reference_norm)

    @property
    def agrees(self) -> bool:
        return not list(self.differences())

    def differences(self) -> Iterator[str]:
        """Describe each difference beyond its tolerance, causes before consequences."""
        if self.elements_missing:
            many = "more" if self.elements_missing < 0 else "fewer"
            yield f"the ranks update {abs(self.elements_missing):,} elements {many} than the model has"
        yield from _differing("weights before the step", self.start, self.parameters)
        if not self.loss_difference <= LOSS_TOLERANCE:
            yield f"loss differs: {self.loss:.7g}, in one process {self.reference_loss:.7g}"
        yield from _differing("gradients", self.gradients, self.parameters)
        if not self.norm_difference <= NORM_TOLERANCE:
            because = f", as if {self.miscounted}" if self.miscounted else ""
            yield f"global norm differs: {self.norm:.7g}, in one process {self.reference_norm:.7g}{because}"
        yield from _differing("weights after the step", self.update, self.parameters)

    def agreeing(self) -> list[str]:
        """Return the names of the comparisons within their tolerances."""
        followed = not self.gradients.differing and self.norm_difference <= NORM_TOLERANCE
        after = "weights after the step" if followed else "the update by this layout's gradients"
        kinds = {
            "weights before the step": not self.start.differing,
            "loss": self.loss_difference <= LOSS_TOLERANCE,
            "gradients": not self.gradients.differing,
            "global norm": self.norm_difference <= NORM_TOLERANCE,
            after: not self.update.differing,
        }
        return [kind for kind, agrees in kinds.items() if agrees]

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "ParityReport | None":
        """Read a report that `write` wrote; None if there is no file."""
        return TypeAdapter(cls).validate_python(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _relative(value: float, reference: float) -> float:
    if not (math.isfinite(value) and math.isfinite(reference)):
        return math.inf  # two equal infinities are no agreement
    if value == reference:
        return 0.0
    return abs(value - reference) / abs(reference) if reference else math.inf


def _differing(kind: str, comparison: TensorComparison, parameters: int) -> Iterator[str]:
    first, worst = comparison.first, comparison.worst
    if first is None or worst is None:
        return
    text = f"{kind} of {first.location} differ by {first.relative:.1e}"
    if math.isfinite(first.factor) and abs(first.factor - 1) > 5e-3:
        text += f", {first.factor:.2f} times those of one process"
    if others := len(comparison.differing) - 1:
        text += f"; so do those of {others} more of {parameters} parameters"
        text += "" if worst.index == first.index else f", most {worst.location}, by {worst.relative:.1e}"
    yield text
