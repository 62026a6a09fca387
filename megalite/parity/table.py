"""What a verification found, on the console: a line for each layout as it is done, and a table of all at the end."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from megalite.layout import ParallelLayout
from megalite.parity.finding import Agreement, Finding


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
    """Return a row for each layout, tensor x pipeline x data; docs/verify.md says what differences are relative to."""
    shown = Table(title="relative differences to one process", title_justify="left", box=SIMPLE_HEAD)
    shown.add_column("layout", no_wrap=True)
    for column in ("loss", "norm"):
        shown.add_column(column, justify="right", no_wrap=True)
    for column in ("worst gradient", "worst weight"):
        shown.add_column(column, overflow="fold")
    shown.add_column("verdict", no_wrap=True)
    shown.add_column("s", justify="right", no_wrap=True)
    for outcome in outcomes:
        layout, found = outcome.layout, outcome.finding
        sizes = f"{layout.tensor}x{layout.pipeline}x{layout.data}"
        cells = ["", "", "", ""]
        if found is not None:
            differences = (found.loss_difference, found.norm_difference)
            cells = [*(f"{value:.1e}" for value in differences), _worst(found.gradients), _worst(found.update)]
        shown.add_row(sizes, *cells, outcome.verdict, f"{outcome.seconds:.1f}")
    return shown


def _worst(agreement: Agreement) -> str:
    return "" if agreement.worst is None else f"{agreement.worst.relative:.1e} {agreement.worst.name}"


def diagnosis(outcome: Outcome) -> list[str]:
    """Say of a layout that does not agree what differs, causes first, and what agrees."""
    if outcome.finding is None:
        return [f"{outcome.layout}: failed; the lines above say how"]
    agreeing = outcome.finding.agreeing()
    lines = [f"{outcome.layout}: {fault}" for fault in outcome.finding.faults()]
    if agreeing:
        lines.append(f"{outcome.layout}: {', '.join(agreeing)} {'agrees' if agreeing == ['loss'] else 'agree'}")
    return lines
