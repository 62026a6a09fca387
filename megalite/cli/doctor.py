"""``megalite doctor``: launcher, hosts, network, devices and disk, looked at before training."""

import faulthandler
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalite.cli.override_argument import Overrides
from megalite.launch import LaunchEnvironment, die_with_parent, launch_environment, launch_local
from megalite.paths import escape

if TYPE_CHECKING:
    from megalite.doctor.report import Report
    from megalite.planning.plan import Plan

_REPORT = "report.json"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("doctor")(_doctor)


def _doctor(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN.yaml]", help="The run file.")] = None,
    overrides: Overrides = None,
    report_into: Annotated[
        Path | None, typer.Option(hidden=True, help="Be a rank; rank 0 writes what is found there.")
    ] = None,
) -> None:
    """Look at launcher, hosts, network, devices and disk before training, in under a minute.

    Says whether all ranks have the same run file, code and data, whether each reaches the others, how fast messages go
    along each axis of the layout, how fast each rank multiplies matrices, and what room there is for checkpoints. Ends
    with status 1 where something is bad; what is merely slow is named.

    Started by hand, it launches the ranks on this machine. Started by a launcher, as for `megalite train`, it looks at
    the launcher's ranks, with or without a run file.
    """
    environment = launch_environment(os.environ)
    if environment is None:
        _launch(run, overrides or [])
    else:
        _be_a_rank(run, overrides or [], environment, report_into)


def _launch(run: Path | None, overrides: list[str]) -> None:
    from megalite.doctor.report import Report

    plan = _prepare(run, overrides, None)
    folder = Path(tempfile.mkdtemp(prefix="megalite-doctor-"))
    words = ["doctor", *([] if run is None else [escape(run), *overrides]), f"--report-into={folder}"]
    status = launch_local(words, 1 if plan is None else plan.layout.world_size, folder / "logs")
    if status != 0:  # the launcher has named the log, which stays
        raise typer.Exit(status)
    report = Report.read(folder / _REPORT)
    shutil.rmtree(folder, ignore_errors=True)
    _show(report)
    raise typer.Exit(report.status)


def _be_a_rank(
    run: Path | None, overrides: list[str], environment: LaunchEnvironment, report_into: Path | None
) -> None:
    # Before the imports, which take seconds in which the launcher may be killed.
    die_with_parent()
    faulthandler.enable()
    os.environ.update(environment.variables())
    from megalite.doctor.checks import run_checks

    report = run_checks(environment, _prepare(run, overrides, environment.world_size))
    if report_into is not None:
        if environment.rank == 0:
            report.write(report_into / _REPORT)
        return
    if environment.rank == 0:
        _show(report)
    raise typer.Exit(report.status)


def _prepare(run: Path | None, overrides: list[str], world_size: int | None) -> "Plan | None":
    from megalite.planning.plan import prepare

    return None if run is None else prepare(run, overrides, world_size)


def _show(report: "Report") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(report.title, markup=False)
    console.print(report.table())
    console.print(report.conclusion, markup=False)
