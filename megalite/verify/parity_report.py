"""What the comparison of one layout found, within which tolerances, and what that says in words."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

LOSS_TOLERANCE = 1e-5
"""Relative difference of the loss."""
NORM_TOLERANCE = 1e-5
"""Relative difference of the gradient's global norm."""
START_TOLERANCE = 0.0
"""The weights before the step follow from (seed, name), or are read: they are equal to the bit."""
GRADIENT_TOLERANCE = 1e-5
"""Norm of a gradient's difference, relative to the norm of the parameter's whole gradient or to `NOISE_SHARE` of the
global norm, whichever is larger."""
NOISE_SHARE = 1e-2
"""Some gradients are nothing but rounding: softmax does not see a bias on the keys."""
UPDATE_TOLERANCE = 1e-5
"""Largest difference of a weight after the step, beyond its own rounding, relative to the learning rate."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a parameter is from its reference on the rank where that is farthest.

    `relative` is in the measure of its tolerance. `factor` is the found values projected on the reference's: 2 where
    they are twice as large, 0 where they have nothing to do with them.
    """

    index: int
    """Place in the order of the model, from 0."""
    name: str
    relative: float
    factor: float
    stage: int
    rank: int

    @property
    def place(self) -> str:
        return f"{self.name} on stage {self.stage}, rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one kind of value compares over the parameters and ranks: the worst, those beyond the tolerance by their
    index, and the first of these in the order of the model."""

    worst: Difference | None = None
    first: Difference | None = None
    differing: tuple[int, ...] = ()

    @classmethod
    def of(cls, differences: Sequence[Difference], tolerance: float) -> "Agreement":
        """Summarise the differences of one rank."""
        beyond = [difference for difference in differences if not difference.relative <= tolerance]
        return cls(
            max(differences, key=_severity, default=None),
            min(beyond, key=_precedence, default=None),
            tuple(sorted({difference.index for difference in beyond})),
        )

    @classmethod
    def over_ranks(cls, agreements: Sequence["Agreement"]) -> "Agreement":
        """Join what the ranks found."""
        return cls(
            max((found.worst for found in agreements if found.worst), key=_severity, default=None),
            min((found.first for found in agreements if found.first), key=_precedence, default=None),
            tuple(sorted({index for found in agreements for index in found.differing})),
        )


def _severity(difference: Difference) -> float:
    return math.inf if math.isnan(difference.relative) else difference.relative


def _precedence(difference: Difference) -> tuple[int, float]:
    return difference.index, -_severity(difference)


@dataclass(frozen=True, slots=True)
class Finding:
    """One layout beside the reference: losses and global norms of both, and how weights and gradients agree."""

    parameters: int
    """Tensors of the model, by their global names."""
    elements_missing: int
    """Elements of them that no rank updates, less those that several do."""
    loss: float
    reference_loss: float
    norm: float
    reference_norm: float
    start: Agreement
    gradients: Agreement
    update: Agreement
    miscounted: str | None = None
    """What the global norm leaves out or counts twice, where its difference is that of one parameter."""

    @property
    def loss_difference(self) -> float:
        return _relative(self.loss, self.reference_loss)

    @property
    def norm_difference(self) -> float:
        return _relative(self.norm, self.reference_norm)

    @property
    def agrees(self) -> bool:
        return not list(self.faults())

    def faults(self) -> Iterator[str]:
        """Say what differs, causes before consequences."""
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
        """Name what agrees."""
        followed = not self.gradients.differing and self.norm_difference <= NORM_TOLERANCE
        after = "weights after the step" if followed else "the update by the gradients as found"
        kinds = {
            "weights before the step": not self.start.differing,
            "loss": self.loss_difference <= LOSS_TOLERANCE,
            "gradients": not self.gradients.differing,
            "global norm": self.norm_difference <= NORM_TOLERANCE,
            after: not self.update.differing,
        }
        return [kind for kind, agrees in kinds.items() if agrees]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Finding | None":
        """Read what `write` wrote; None where it wrote nothing."""
        return TypeAdapter(cls).validate_python(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _relative(value: float, reference: float) -> float:
    if not (math.isfinite(value) and math.isfinite(reference)):
        return math.inf  # two infinities are equal and prove nothing
    if value == reference:
        return 0.0
    return abs(value - reference) / abs(reference) if reference else math.inf


def _differing(kind: str, agreement: Agreement, parameters: int) -> Iterator[str]:
    first, worst = agreement.first, agreement.worst
    if first is None or worst is None:
        return
    text = f"{kind} of {first.place} differ by {first.relative:.1e}"
    if math.isfinite(first.factor) and abs(first.factor - 1) > 5e-3:
        text += f", {first.factor:.2f} times those of one process"
    if others := len(agreement.differing) - 1:
        text += f"; so do those of {others} more of {parameters} parameters"
        text += "" if worst.index == first.index else f", most {worst.place}, by {worst.relative:.1e}"
    yield text
