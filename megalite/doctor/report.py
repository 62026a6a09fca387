"""What an examination found: a row for each thing that was looked at, and the table on the console."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter
from rich.table import Table

Verdict = Literal["ok", "warn", "bad"]
"""``warn`` trains, though slower than it might, or by luck; ``bad`` does not train, or not to the end."""

_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was looked at, and what was found, a line each."""

    check: str
    verdict: Verdict
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """All that an examination found, in the order in which it looked, and the seconds that it took."""

    title: str
    rows: tuple[Row, ...]
    seconds: float

    @property
    def status(self) -> int:
        """The exit status: 1 where something is bad."""
        return int(bool(self._with("bad")))

    @property
    def conclusion(self) -> str:
        """One line on the whole."""
        bad, warned = self._with("bad"), self._with("warn")
        if bad:
            found = f"bad: {', '.join(bad)}"
        else:
            found = f"nothing is bad; warnings: {', '.join(warned)}" if warned else "fine"
        return f"{found} ({self.seconds:.1f} s)"

    def table(self) -> Table:
        """Return a row for each thing that was looked at."""
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
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read what `write` wrote."""
        return TypeAdapter(cls).validate_json(path.read_text(encoding="utf-8"))

    def _with(self, verdict: Verdict) -> list[str]:
        return [row.check for row in self.rows if row.verdict == verdict]


def _plain(text: str) -> str:
    """Keep rich from reading square brackets as its own."""
    return text.replace("[", r"\[")
