"""``megalite train``: launch the ranks of a run on this machine, or be one of them."""

import faulthandler
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from megalite.cli.override_argument import Overrides
from megalite.launch import (
    LaunchEnvironment,
    announce,
    clear_announcement,
    die_with_parent,
    is_interactive_shell,
    launch_environment,
    tee_to_log,
)


def register(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command(name="train")(_train)


def _train(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    overrides: Overrides = None,
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
    if dry_run:
        _dry_run(run, overrides, None)
        return
    if is_interactive_shell(os.environ):
        typer.echo("megalite: this is an interactive shell of Slurm: the ranks are started on this machine", err=True)
    announce(f"checking {run.name or run}")  # before the imports, which may take a second
    from megalite.planning.plan import prepare
    from megalite.training.local_launch import check_before_launch, launch_ranks, state_writer

    plan = prepare(run, overrides, None)
    if (step := check_before_launch(plan)) is not None:
        clear_announcement()
        typer.echo(f"nothing is left to train: step {step:,} of {plan.config.train.steps:,} is done")
        typer.echo(f"run: {plan.config.run.dir}")
        return
    raise typer.Exit(launch_ranks(plan, run, overrides, state_writer(plan, announce), lambda reason: None))


def _be_a_rank(run: Path, overrides: list[str], dry_run: bool, environment: LaunchEnvironment) -> None:
    # Before the imports, which take seconds in which the launcher may be killed.
    die_with_parent()
    faulthandler.enable()
    os.environ.update(environment.variables())
    if dry_run:
        if environment.rank == 0:
            _dry_run(run, overrides, environment.world_size)
        return
    from megalite.planning.plan import prepare
    from megalite.training.local_launch import state_writer

    plan = prepare(run, overrides, environment.world_size)
    if environment.launcher != "megalite":  # which keeps logs itself
        log = plan.config.run.dir / "logs" / f"rank_{environment.rank}.log"
        tee_to_log(log, rank=environment.rank, stdout=environment.rank != 0)
    marker = state_writer(plan, announce)
    try:
        if environment.rank == 0:
            marker.starting("importing torch and DeepSpeed")
            marker.start_refreshing()
        from megalite.training.train import train

        status = train(plan, environment, marker=marker)
    except Exception as error:
        if environment.launcher != "megalite":  # which tells of the first failure, once all ranks have ended
            marker.failed(f"rank {environment.rank} on {socket.gethostname()}: {str(error) or type(error).__name__}")
        raise
    raise typer.Exit(status)


def _dry_run(run: Path, overrides: list[str], world_size: int | None) -> None:
    """Make the checks of a start, by this process alone, and print the plan; what is not there is told."""
    announce(f"checking {run.name or run}")
    from megalite.checkpoint import forecast
    from megalite.files import require_unlocked
    from megalite.planning.plan import prepare
    from megalite.planning.preflight import check_present_data, check_start

    plan = prepare(run, overrides, world_size, tokenizer_may_be_absent=True)
    folder = plan.config.run.dir
    check_start(plan)
    datasets, absent = check_present_data(plan)
    # Only now, since it imports torch, which takes seconds.
    from rich.console import Console

    from megalite.planning.description import describe
    from megalite.planning.preview import preview_start

    start = preview_start(plan)
    require_unlocked(folder, f"run.dir={folder}")
    description = describe(plan)
    clear_announcement()
    Console().print(description)
    described = datasets.describe() if datasets is not None else []
    notes = (*plan.config.notes, *plan.config.deepspeed.notes, *plan.unchecked, *absent)
    for line in (*notes, *described, forecast.describe(plan.config, plan.checkpoint_bytes), *start):
        typer.echo(line)
