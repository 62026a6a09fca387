"""Console output of a verification: a verdict per layout, the final table, and the description of differences."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from megalite.parallel.layout import ParallelLayout
from megalite.verify.layouts import write_layout
from megalite.verify.parity_report import ParityReport


@dataclass(frozen=True, slots=True)
class LayoutResult:
    """The result of one layout, and the seconds it took, start included; `report` is None if the ranks failed."""

    layout: ParallelLayout
    report: ParityReport | None
    seconds: float

    @property
    def agrees(self) -> bool:
        return self.report is not None and self.report.agrees

    @property
    def verdict(self) -> str:
        if self.report is None:
            return "failed"
        return "agrees" if self.report.agrees else "differs"


def table(results: Sequence[LayoutResult]) -> Table:
    """Return a table with a row per layout, tensor x pipeline x data; docs/howto/verify.md defines the differences."""
    shown = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("layout", "loss", "norm", "worst gradient", "weights", "verdict", "s"):
        shown.add_column(column, justify="right" if column == "s" else "left", no_wrap=column != "worst gradient")
    for result in results:
        layout, found = result.layout, result.report
        cells = ["", "", "", ""]
        if found is not None:
            worst = found.gradients.worst
            gradient = "" if worst is None else f"{worst.relative:.0e} {worst.name}"
            update = "" if found.update.worst is None else f"{found.update.worst.relative:.0e}"
            cells = [f"{found.loss_difference:.0e}", f"{found.norm_difference:.0e}", gradient, update]
        shown.add_row(write_layout(layout), *cells, result.verdict, f"{result.seconds:.1f}")
    return shown


def diagnosis(result: LayoutResult) -> list[str]:
    """Describe a layout that does not agree: the differences, causes first, and the comparisons that agree."""
    if result.report is None:
        return [f"{result.layout} failed; the lines above say how"]
    agreeing = ", ".join(result.report.agreeing()) or "nothing"
    differences = (f"  {difference}" for difference in result.report.differences())
    return [f"{result.layout} differs:", *differences, f"  what agrees: {agreeing}"]
