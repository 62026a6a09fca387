"""``megalite train``: launch the ranks of a run on this machine, or be one of them."""

import faulthandler
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalite.launch import LaunchEnvironment, die_with_parent, launch_environment, launch_local
from megalite.paths import spell

if TYPE_CHECKING:
    from megalite.plan import Plan


def register(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command(name="train")(_train)


def _train(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="section.key=value", help="Settings in place of the run file's."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Resolve and check everything; print the rank map, the parameters by rank and the simulated pipeline.",
        ),
    ] = False,
) -> None:
    """Train the model of a run file.

    Started by hand, it launches the ranks that the layout asks for on this machine. Started by a launcher, it takes
    its place among the ranks:

    deepspeed --num_accelerators 4 --module megalite train RUN.yaml

    torchrun --nproc_per_node 4 -m megalite train RUN.yaml

    srun --ntasks 4 python -m megalite train RUN.yaml
    """
    environment = launch_environment(os.environ)
    if environment is None:
        _launch(run, overrides or [], dry_run)
    else:
        _be_a_rank(run, overrides or [], dry_run, environment)


def _launch(run: Path, overrides: list[str], dry_run: bool) -> None:
    from megalite.files import sole_user
    from megalite.plan import prepare

    plan = prepare(run, overrides, None)
    start = plan.check_start()
    if dry_run:
        datasets = plan.check_data(keep_index=False)
        _show(plan)
        for line in (*plan.config.notes, *datasets.describe(), plan.describe_checkpoints(), start):
            typer.echo(line)
        return
    plan.check_data()
    folder = plan.config.run.dir
    with sole_user(folder, f"run.dir={folder}"):
        pass  # rank 0 takes it for the run; this ends a second run before its ranks start
    status = launch_local(
        ["train", spell(run), *overrides],
        plan.layout.world_size,
        folder / "logs",
        stop_grace=math.inf,  # they save a checkpoint before they end
        max_restarts=plan.config.train.max_restarts,
    )
    raise typer.Exit(status)


def _be_a_rank(run: Path, overrides: list[str], dry_run: bool, environment: LaunchEnvironment) -> None:
    # Before the imports, which take seconds in which the launcher may be killed.
    die_with_parent()
    faulthandler.enable()
    os.environ.update(environment.variables())
    from megalite.plan import prepare
    from megalite.train import train

    plan = prepare(run, overrides, environment.world_size)
    if not dry_run:
        raise typer.Exit(train(plan, environment))
    if environment.rank == 0:
        _show(plan)
        for line in plan.config.notes:
            typer.echo(line)


def _show(plan: "Plan") -> None:
    from rich.console import Console

    Console().print(plan.describe())
