"""What a verification found, on the console: a line for each layout as it is done, and a table of all at the end."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from megalite.parallel.layout import ParallelLayout
from megalite.verify.layouts import write_layout
from megalite.verify.parity_report import Finding


@dataclass(frozen=True, slots=True)
class Outcome:
    """One layout that was compared, and how long that took, its start included; without a finding it failed."""

    layout: ParallelLayout
    finding: Finding | None
    seconds: float

    @property
    def agrees(self) -> bool:
        return self.finding is not None and self.finding.agrees

    @property
    def verdict(self) -> str:
        if self.finding is None:
            return "failed"
        return "agrees" if self.finding.agrees else "differs"


def table(outcomes: Sequence[Outcome]) -> Table:
    """Return a row for each layout, tensor x pipeline x data; docs/howto/verify.md explains the differences."""
    shown = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("layout", "loss", "norm", "worst gradient", "weights", "verdict", "s"):
        shown.add_column(column, justify="right" if column == "s" else "left", no_wrap=column != "worst gradient")
    for outcome in outcomes:
        layout, found = outcome.layout, outcome.finding
        cells = ["", "", "", ""]
        if found is not None:
            worst = found.gradients.worst
            gradient = "" if worst is None else f"{worst.relative:.0e} {worst.name}"
            update = "" if found.update.worst is None else f"{found.update.worst.relative:.0e}"
            cells = [f"{found.loss_difference:.0e}", f"{found.norm_difference:.0e}", gradient, update]
        shown.add_row(write_layout(layout), *cells, outcome.verdict, f"{outcome.seconds:.1f}")
    return shown


def diagnosis(outcome: Outcome) -> list[str]:
    """Say of a layout that does not agree what differs, causes first, and what agrees."""
    if outcome.finding is None:
        return [f"{outcome.layout} failed; the lines above say how"]
    agreeing = ", ".join(outcome.finding.agreeing()) or "nothing"
    faults = (f"  {fault}" for fault in outcome.finding.faults())
    return [f"{outcome.layout} differs:", *faults, f"  what agrees: {agreeing}"]
