"""``megalite status``: how a run is doing, and which ranks hold it up."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalite.layout import name_ranks

if TYPE_CHECKING:
    from megalite.run_status import RunStatus

_SHOWN = 16


def register(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command(name="status")(_status)


def _status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run file, or the folder of the run.")],
) -> None:
    """Show how a run is doing, from the files in its folder: its state, its last step, and the ranks that are behind.

    It is running, stopped (it was asked to, and can go on), done, or dead: ended without a word.
    """
    from megalite.run_status import run_status

    for line in _lines(run_status(run)):
        typer.echo(line)


def _lines(status: "RunStatus") -> Iterator[str]:
    yield f"{status.folder}: {status.state}{_of_the_end(status)}"
    if status.steps:
        last = status.steps[-1]
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        yield (
            f"step {last['step']:,}/{status.total_steps:,} | loss {loss} | {last['tokens_per_second']:,.0f} tok/s"
            f" | {last['step_seconds']:.2f} s a step{_eta(status)}"
        )
    else:
        yield f"no step of {status.total_steps:,} is done yet"
    if status.state in ("running", "dead"):
        yield from _ranks(status)


def _of_the_end(status: "RunStatus") -> str:
    if status.state == "dead":
        last = max((beat.time for beat in status.beats), default=None)
        return "" if last is None else f", no rank has written for {status.now - last:,.0f} s"
    if status.state == "stopped" and {"step", "reason"} <= set(status.stopped):
        checkpoint = status.stopped.get("checkpoint") or "no checkpoint"
        return f" after step {status.stopped['step']}, asked by {status.stopped['reason']}; {checkpoint}"
    return ""


def _eta(status: "RunStatus") -> str:
    seconds = status.seconds_left
    if status.state != "running" or seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f" | ETA {minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _ranks(status: "RunStatus") -> Iterator[str]:
    behind, missing = status.laggards, status.missing
    ranks = "1 rank" if status.ranks == 1 else f"{status.ranks:,} ranks"
    yield f"{ranks}: {len(behind):,} behind or silent, {len(missing):,} not heard of yet"
    for beat in sorted(behind, key=lambda beat: (beat.place(), beat.time))[:_SHOWN]:
        yield f"  {beat.describe(status.now)}"
    if len(behind) > _SHOWN:
        yield f"  and {len(behind) - _SHOWN:,} more"
    if missing:
        yield f"  not heard of: {name_ranks(missing)}"
