"""``megalite status``: how a run is doing, and which ranks hold it up."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megalite.cli.columns import table
from megalite.errors import UserError
from megalite.parallel.layout import name_ranks

if TYPE_CHECKING:
    from megalite.monitoring.run_status import RunStatus

_SHOWN = 16
_SHOWN_LETTERS = 80


def register(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command(name="status")(_status)


def _status(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The run file, the folder of the run, or a folder of several.")
    ],
) -> None:
    """Show how a run is doing, from the files in its folder: its state, its last step, and the ranks that are behind.

    It is starting, running, stopped (it was asked to, and can go on), done, failed (it said why), or dead: it ended
    without a word. Of a folder of runs each has a line.
    """
    from megalite.monitoring.run_status import run_status, runs_in

    runs = runs_in(run)
    for line in table(_rows(run, runs), right=(2, 3, 4)) if runs else _lines(run_status(run)):
        typer.echo(line)


def _rows(folder: Path, runs: Sequence[Path]) -> list[tuple[str, ...]]:
    """Return a row for each run of a folder, below the names of the columns."""
    from megalite.monitoring.run_status import run_status

    rows = [("run", "state", "step", "loss", "tok/s", "")]
    for run in runs:
        name = str(run.relative_to(folder))
        try:
            status = run_status(run)
        except UserError as error:
            rows.append((name, "unreadable", "", "", "", _short(str(error).splitlines()[0])))
            continue
        step, loss, speed = "0", "", ""
        if status.steps:
            last = status.steps[-1]
            step, loss, speed = f"{last['step']:,}", _loss(last), f"{last['tokens_per_second']:,.0f}"
        more = (_of_the_end(status) or _eta(status)).strip(" ,:|")
        rows.append((name, status.state, f"{step}/{status.total_steps:,}", loss, speed, _short(more)))
    return rows


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_LETTERS else f"{text[: _SHOWN_LETTERS - 3]}..."


def _loss(step: Mapping[str, Any]) -> str:
    return "not finite" if step["loss"] is None else f"{step['loss']:.4f}"


def _lines(status: "RunStatus") -> Iterator[str]:
    yield f"{status.folder}: {status.state}{_of_the_end(status)}"
    if status.steps:
        last = status.steps[-1]
        yield (
            f"step {last['step']:,}/{status.total_steps:,} | loss {_loss(last)} | "
            f"{last['tokens_per_second']:,.0f} tok/s | {last['step_seconds']:.2f} s a step{_eta(status)}"
        )
    else:
        yield f"no step of {status.total_steps:,} is done yet"
    if status.has_ranks:
        yield from _ranks(status)
    yield from _how_to_go_on(status)


def _is_start(status: "RunStatus") -> bool:
    return status.state_file is not None and status.state_file.state == "starting"


def _of_the_end(status: "RunStatus") -> str:
    told = status.state_file
    if status.state == "starting":
        assert told is not None
        return f" {told.ranks:,} {'rank' if told.ranks == 1 else 'ranks'}: {told.doing}"
    if status.state == "failed":
        assert told is not None
        first, *more = (told.reason or "").splitlines() or [""]
        when = f", while it was starting ({told.doing})" if told.doing else ""
        return f"{when}: {first}" + (f" (and {len(more):,} more lines)" if more else "")
    if status.state == "dead":
        if told is not None and _is_start(status):
            return f", while it was starting ({told.doing}): nothing was written for {status.now - told.time:,.0f} s"
        last = max((beat.time for beat in status.heartbeats), default=None)
        return "" if last is None else f", no rank has written for {status.now - last:,.0f} s"
    if status.state == "stopped":
        found = status.stopped
        if not found and told is not None:
            found = {"step": told.step, "reason": told.reason, "checkpoint": told.checkpoint}
        if {"step", "reason"} <= set(found):
            checkpoint = found.get("checkpoint") or "no checkpoint"
            return f" after step {found['step']}, asked by {found['reason']}; {checkpoint}"
    return ""


def _how_to_go_on(status: "RunStatus") -> Iterator[str]:
    if status.state == "stopped":
        by_steps = not status.stopped and status.state_file is not None
        kept = status.stopped.get("checkpoint") or (status.state_file.checkpoint if status.state_file else None)
        how = "without train.stop_after, or with a later one" if by_steps else "as before"
        whence = "it goes on from there" if kept else "it begins with the newest checkpoint there is, or anew"
        yield f"to go on: start it again {how}; {whence}"
    elif status.state in ("failed", "dead"):
        from megalite.checkpoint.discovery import CHECKPOINTS, find_checkpoints

        kept = find_checkpoints(status.folder / CHECKPOINTS)
        whence = "it goes on from its newest checkpoint" if kept else "it begins anew: there is no checkpoint yet"
        yield f"logs of the ranks: {status.folder / 'logs'}; started again, {whence}"


def _eta(status: "RunStatus") -> str:
    seconds = status.seconds_left
    if status.state != "running" or seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f" | ETA {minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _ranks(status: "RunStatus") -> Iterator[str]:
    behind, missing = status.slow_ranks, status.missing
    ranks = "1 rank" if status.ranks == 1 else f"{status.ranks:,} ranks"
    yield f"{ranks}: {len(behind):,} behind or silent, {len(missing):,} not heard of yet"
    for beat in sorted(behind, key=lambda beat: (beat.progress_key(), beat.time))[:_SHOWN]:
        yield f"  {beat.describe(status.now)}"
    if len(behind) > _SHOWN:
        yield f"  and {len(behind) - _SHOWN:,} more"
    if missing:
        yield f"  not heard of: {name_ranks(missing)}"
