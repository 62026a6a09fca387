"""The report of `megalite doctor`: a row per check, and the table on the console."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter
from rich.table import Table

Verdict = Literal["ok", "warn", "bad"]
"""With ``warn`` training runs, but slowly or unreliably; with ``bad`` training does not start, or not finish."""

_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


@dataclass(frozen=True, slots=True)
class Row:
    """A check, its verdict, and the findings, a line each."""

    check: str
    verdict: Verdict
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The results of all checks, in the order in which they ran, and the seconds they took."""

    title: str
    rows: tuple[Row, ...]
    seconds: float

    @property
    def status(self) -> int:
        """The exit status: 1 if a check is bad, otherwise 0."""
        return int(bool(self._with("bad")))

    @property
    def conclusion(self) -> str:
        """A line that summarises the report."""
        bad, warned = self._with("bad"), self._with("warn")
        if bad:
            found = f"bad: {', '.join(bad)}"
        else:
            found = f"nothing is bad; warnings: {', '.join(warned)}" if warned else "fine"
        return f"{found} ({self.seconds:.1f} s)"

    def table(self) -> Table:
        """Return the table for the console, a row per check."""
        shown = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
        shown.add_column(no_wrap=True)
        shown.add_column(no_wrap=True)
        shown.add_column(overflow="fold")
        for row in self.rows:
            verdict = f"[{_STYLES[row.verdict]}]{row.verdict}[/]"
            for number, line in enumerate(row.lines):
                shown.add_row(*((row.check, verdict) if number == 0 else ("", "")), _plain(line))
        return shown

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read a report that `write` wrote."""
        return TypeAdapter(cls).validate_json(path.read_text(encoding="utf-8"))

    def _with(self, verdict: Verdict) -> list[str]:
        return [row.check for row in self.rows if row.verdict == verdict]


def _plain(text: str) -> str:
    """Escape square brackets, which rich would read as markup."""
    return text.replace("[", r"\[")
