"""``megalite train``: launch the ranks of a run on this machine, or be one of them."""

import faulthandler
import math
import os
from pathlib import Path
from typing import Annotated

import typer

from megalite.launch import LaunchEnvironment, die_with_parent, launch_environment, launch_local
from megalite.paths import spell


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
            help="Make every check of a start, and print the ranks, what each holds and the simulated pipeline. Data "
            "that are not there are told, and do without.",
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

    if dry_run:
        _dry_run(run, overrides, None)
        return
    plan = prepare(run, overrides, None)
    plan.check_start()
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

    if not dry_run:
        raise typer.Exit(train(prepare(run, overrides, environment.world_size), environment))
    if environment.rank == 0:
        _dry_run(run, overrides, environment.world_size)


def _dry_run(run: Path, overrides: list[str], world_size: int | None) -> None:
    """Make the checks of a start, by this process alone, and print the plan; what is not there is told."""
    from rich.console import Console

    from megalite.files import require_unused
    from megalite.plan import prepare
    from megalite.resume import foresee_start

    plan = prepare(run, overrides, world_size, tokenizer_may_be_absent=True)
    folder = plan.config.run.dir
    plan.check_start()
    datasets, absent = plan.check_data_that_is_there()
    start = foresee_start(plan)
    require_unused(folder, f"run.dir={folder}")
    Console().print(plan.describe())
    described = datasets.describe() if datasets is not None else []
    for line in (*plan.config.notes, *plan.config.deepspeed.notes, *plan.unchecked, *absent, *described, *start):
        typer.echo(line)
