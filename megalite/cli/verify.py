"""``megalite verify``: one step of a run's layout beside the same step in one process, before a month of training."""

import faulthandler
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalite.cli.override_argument import Overrides
from megalite.errors import USER_ERROR_STATUS, UserError
from megalite.launch import LaunchEnvironment, die_with_parent, launch_environment, launch_local, run_rank_subprocess
from megalite.paths import escape

if TYPE_CHECKING:
    from megalite.parallel.layout import ParallelLayout
    from megalite.planning.plan import Plan
    from megalite.verify.table import LayoutResult

_STOPPED = 128
_FEW_RANKS = 4
"""So many ranks are started on any machine without asking: the quickstart's layout has them."""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("verify")(_verify)


def _verify(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    overrides: Overrides = None,
    scale: Annotated[
        bool, typer.Option("--scale", help="A smaller model of the same shape: seconds on a laptop.")
    ] = False,
    layouts: Annotated[
        str | None,
        typer.Option(
            metavar="TxPxD,...",
            help="Tensor x pipeline x data of what is compared; unless given, each axis alone and then the whole.",
        ),
    ] = None,
    oversubscribe: Annotated[
        bool,
        typer.Option("--oversubscribe", help="Start more ranks on this machine than twice its cores, and than 4."),
    ] = False,
    rank_into: Annotated[
        Path | None, typer.Option(hidden=True, help="Be a rank of the one layout; write what is found there.")
    ] = None,
) -> None:
    """Check that a run's layout trains as one process of plain torch does.

    One step in fp32, with the run's own model, data, layout and ZeRO stage: the loss, every parameter's gradient, the
    global norm and the weights after the step. Ends with status 1 where something differs, and says what.

    Started by hand, it launches the ranks on this machine, layout by layout, and refuses a layout of more than twice
    as many ranks as there are cores. Started by a launcher, as for `megalite train`, it uses the launcher's ranks.
    """
    environment = launch_environment(os.environ)
    if environment is not None:
        # Before the imports, which take seconds in which the launcher may be killed.
        die_with_parent()
        faulthandler.enable()
    words = [*(overrides or []), *(["--scale"] if scale else [])]
    if rank_into is not None:
        assert environment is not None
        assert layouts is not None
        _be_a_rank(run, overrides or [], scale, layouts, rank_into, environment)
        return
    world_size = None if environment is None else environment.world_size
    plan, notes = _prepare(run, overrides or [], scale, world_size)
    limit = None if oversubscribe or world_size is not None else max(_FEW_RANKS, 2 * _cores())
    chosen = _layouts(plan, layouts, world_size, limit)
    speaks = environment is None or environment.rank == 0
    if speaks:
        _introduce(plan, notes, [plan.layout] if layouts is None else chosen)
    # The ranks of a case do not know how many the launcher started.
    outcomes = _run_cases(
        ["verify", escape(run), *words, f"parallel.data={plan.config.parallel.data}"],
        chosen,
        environment,
        speaks=speaks,
    )
    if speaks:
        raise typer.Exit(_conclude(outcomes))


def _prepare(
    run: Path, overrides: Sequence[str], scale: bool, world_size: int | None
) -> "tuple[Plan, tuple[str, ...]]":
    from megalite.convert.open import open_weights
    from megalite.planning.plan import plan_of, prepare
    from megalite.verify.scaled_down import scale_down

    plan = prepare(run, overrides, world_size)
    if not scale:
        return plan, ()
    if plan.config.init_from is not None:  # left out of the smaller model, not of the run
        plan.requirements.require_weights(open_weights(plan.config.init_from))
    config, notes = scale_down(plan.config)
    return plan_of(config, plan.tokenizer_digest), notes


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _layouts(
    plan: "Plan", given: str | None, world_size: int | None, limit: int | None
) -> "tuple[ParallelLayout, ...]":
    """Return the layouts to compare, each of which can run; raise UserError where one cannot.

    A layout of more than `limit` ranks cannot, where there is a limit; this is found before any data are read.
    """
    from megalite.planning.preflight import check_data, check_start
    from megalite.verify.layouts import case_plan, layouts_of, read_layouts, require_cores, require_ranks, write_layout

    chosen = layouts_of(plan.layout) if given is None else read_layouts(given)
    if world_size is not None:
        require_ranks(chosen, world_size)
    cases = []
    for layout in chosen:
        try:
            cases.append(case_plan(plan, layout, plan.config.run.dir))
        except UserError as error:
            raise UserError(f"layout {write_layout(layout)}: {error}") from None
    if limit is not None:
        require_cores(plan, chosen, limit, _cores())
    check_start(cases[-1])
    check_data(cases[-1], keep_index=False)
    return chosen


def _introduce(plan: "Plan", notes: Sequence[str], layouts: "Sequence[ParallelLayout]") -> None:
    from megalite.data.batch_schedule import BatchSchedule

    config = plan.config
    typer.echo(
        f"{config.source.name}: {config.model.architecture}, {'; '.join(map(str, layouts))}, "
        f"{config.sharding}, in fp32; "
        f"{len(BatchSchedule(config.train).samples(1)):,} sequences x {config.data.sequence_length:,} tokens"
    )
    for note in notes:
        typer.echo(f"--scale: {note}")


def _run_cases(
    words: Sequence[str],
    layouts: "Sequence[ParallelLayout]",
    environment: LaunchEnvironment | None,
    *,
    speaks: bool,
) -> "list[LayoutResult]":
    """Compare one layout after the other, each in fresh processes: DeepSpeed's engine is one a process."""
    from megalite.verify.layouts import write_layout
    from megalite.verify.parity_report import ParityReport
    from megalite.verify.table import LayoutResult

    outcomes = []
    folder = Path(tempfile.mkdtemp(prefix="megalite-verify-"))
    for number, layout in enumerate(layouts, start=1):
        here = folder / write_layout(layout)
        here.mkdir()
        if environment is not None and environment.rank >= layout.world_size:
            continue
        if speaks:
            ranks = "1 rank" if layout.world_size == 1 else f"{layout.world_size} ranks"
            typer.echo(f"{layout}, {ranks}: ", nl=False)
        argv = [*words, f"--layouts={write_layout(layout)}", f"--rank-into={here}"]
        started = time.perf_counter()
        if environment is None:
            status = launch_local(argv, layout.world_size, here / "logs")
        else:
            status = run_rank_subprocess(argv, environment, world_size=layout.world_size, number=number)
        report = ParityReport.read(here / "report.json") if status == 0 else None
        outcome = LayoutResult(layout, report, time.perf_counter() - started)
        if speaks:
            typer.echo(f"{outcome.verdict}, {outcome.seconds:.1f} s")
        if status == USER_ERROR_STATUS or status >= _STOPPED or (status != 0 and environment is not None):
            raise typer.Exit(status if status > 0 else _STOPPED - status)
        outcomes.append(outcome)
    if all(outcome.report is not None for outcome in outcomes) or not speaks:  # else the lines above name the logs
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def _conclude(outcomes: "Sequence[LayoutResult]") -> int:
    """Show the table and what differs; return the exit status."""
    from rich.console import Console

    from megalite.verify.table import diagnosis, table

    Console().print(table(outcomes))
    for outcome in outcomes:
        if not outcome.agrees:
            for line in diagnosis(outcome):
                typer.echo(line)
    if all(outcome.agrees for outcome in outcomes):
        typer.echo("verified: every layout trains as one process does")
        return 0
    typer.echo("not verified")
    return 1


def _be_a_rank(
    run: Path, overrides: Sequence[str], scale: bool, layout: str, folder: Path, environment: LaunchEnvironment
) -> None:
    os.environ.update(environment.variables())
    from megalite.verify.comparison import verify_layout
    from megalite.verify.layouts import case_plan, read_layouts

    target, _ = _prepare(run, overrides, scale, None)
    (size,) = read_layouts(layout)
    report = verify_layout(case_plan(target, size, folder / "run"), environment)
    if environment.rank == 0:
        report.write(folder / "report.json")
