"""``megalite slurm``: a batch script for a run, and the job of it."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalite.cli.override_argument import Overrides
from megalite.errors import UserError, nearest
from megalite.files import writing
from megalite.slurm import LAUNCHERS, Job, ranks_per_node, render, tensor_over_nodes_warning

if TYPE_CHECKING:
    from megalite.config import RunConfig


_OWN = {
    "job-name": "use --name",
    "nodes": "use --nodes",
    "ntasks": "use --ranks-per-node",
    "ntasks-per-node": "use --ranks-per-node",
    "cpus-per-task": "use --cpus-per-rank",
    "gpus-per-node": "use --gpus-per-node",
    "account": "use --account",
    "partition": "use --partition",
    "time": "use --time",
    "signal": "use --stop-before",
    "requeue": "use --max-restarts",
    "no-requeue": "use --max-restarts 0",
    "output": "the job logs to logs/NAME/JOB.log, see --name, and under --output beside the script",
    "array": "a run is one job",
    "chdir": "submit from the folder that the run file's paths start in",
}
"""Options of sbatch that the script sets itself, and what to use in their place."""


def register(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command(name="slurm")(_slurm)


def _slurm(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes the job has.")],
    overrides: Overrides = None,
    launcher: Annotated[str, typer.Option(help=f"What starts the ranks: {', '.join(LAUNCHERS)}.")] = "srun",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the script to a file; submit nothing.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; write and submit nothing.")] = False,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks-per-node", min=1, help="By default the layout's ranks over the nodes."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, help="By default the job asks for none.")
    ] = None,
    cpus: Annotated[int | None, typer.Option("--cpus-per-rank", min=1, help="Processors of a rank.")] = None,
    time: Annotated[str | None, typer.Option(help="The job's limit, in sbatch's form: 24:00:00 by default.")] = None,
    stop_before: Annotated[
        int,
        typer.Option(
            min=10,
            metavar="SECONDS",
            help="How long before the limit the run is asked to save and end; sbatch --signal.",
        ),
    ] = 300,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often the job is put back into the queue at most; 0: never.")
    ] = 20,
    account: Annotated[str | None, typer.Option(help="The account that pays.")] = None,
    partition: Annotated[str | None, typer.Option(help="The partition.")] = None,
    name: Annotated[str | None, typer.Option(help="The job's name; by default that of the run's folder.")] = None,
    container: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help='Words in front of python on the nodes: "apptainer exec --nv image.sif".'),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any further option of sbatch: --sbatch qos=high --sbatch exclusive."),
    ] = None,
) -> None:
    """Submit a run as a job of Slurm, from the folder that its paths start in.

    The script is made of the run file and of the launcher's template in slurm/.

    The job logs to logs/NAME/JOB.log. At its time limit and after a fault it goes back into the queue.

    --output and --dry-run submit nothing. A script that --output writes logs to NAME-JOB.log beside itself.
    """
    if launcher not in LAUNCHERS:
        raise UserError(f"--launcher {launcher!r} is no launcher{nearest(launcher, LAUNCHERS)}")
    _check_time(time, stop_before)
    config = _checked(run, overrides or [], nodes, ranks, gpus, max_restarts)
    per_node = config.layout.world_size // nodes
    if warning := tensor_over_nodes_warning(config.parallel.tensor, per_node, nodes):
        typer.echo(warning, err=True)
    name = name or re.sub(r"[^\w.-]", "_", config.run.dir.resolve().name, flags=re.ASCII)
    if name in (".", "..") or "/" in name:
        raise UserError(f"--name {name!r} is to be a folder in logs/; write it without slashes")
    options = {
        "job-name": name,
        "nodes": str(nodes),
        "ntasks-per-node": str(per_node),
        "cpus-per-task": str(cpus) if cpus else None,
        "gpus-per-node": str(gpus) if gpus else None,
        "account": account,
        "partition": partition,
        "signal": f"B:USR1@{stop_before}",
        **({"time": time} if time else {}),
        **({} if max_restarts else {"requeue": None, "no-requeue": ""}),
        **({"output": _log_beside(output)} if output is not None and not dry_run else {}),
        **_further(sbatch or []),
    }
    script = render(
        Job(
            launcher=launcher,
            arguments=(str(config.run.dir), str(run), *(overrides or [])),
            options=options,
            path=str(Path(sys.executable).parent),
            max_restarts=max_restarts,
            container=_words(container or ""),
        )
    )
    if max_restarts and not config.checkpoint.every:
        note = f"only a stop, as before the time limit, and the last step, {config.train.last_step:,}, are saved"
        typer.echo(
            f"note: checkpoint.every=0: {note}; after a fault the job begins at the stop before, or anew", err=True
        )
    if dry_run:
        typer.echo(script, nl=False)
        return
    if output is not None:
        with writing(output, "give --output the path of a file, in a folder that is there"):
            output.write_text(script, encoding="utf-8")
        log = options["output"].replace("%x", name).replace("%j", "JOB")
        typer.echo(f"{output}: written; submit it from this folder by: sbatch {shlex.quote(str(output))}; log: {log}")
        return
    _require_sbatch()
    logs = Path("logs", name)
    with writing(logs, "submit from a folder that you may write in"):
        logs.mkdir(parents=True, exist_ok=True)  # Slurm makes none, and a job whose output has no folder fails
    job = _submit(script)
    typer.echo(f"job {job}: {config.layout}, {nodes} nodes x {options['ntasks-per-node']} ranks; log: {logs / job}.log")


def _log_beside(script: Path) -> str:
    """Where the job of a script logs, in a folder that is there whenever the script is."""
    beside = str(script.parent / "%x-%j.log")
    # sbatch takes a pattern in the script's name for one of its own, and no blank.
    return beside if re.fullmatch(r"[\w./+,:@=-]*", str(script.parent), re.ASCII) else "%x-%j.log"


def _checked(
    run: Path, overrides: list[str], nodes: int, ranks: int | None, gpus: int | None, max_restarts: int
) -> "RunConfig":
    """Return the run as its ranks will resolve it."""
    from megalite.config import load_run_config
    from megalite.convert.open import section_of_weights
    from megalite.planning.plan import prepare

    config = load_run_config(run, overrides, section_of_weights)
    if config.resume != "auto" and max_restarts:
        raise UserError(
            f"{run.name}: resume={config.resume!r} would begin there again after every restart of the job; "
            "write resume=auto, or give --max-restarts 0"
        )
    resolved = prepare(run, overrides, nodes * ranks_per_node(config, nodes, ranks, gpus)).config
    _check_checkpoints(resolved, max_restarts)
    return resolved


def _check_checkpoints(config: "RunConfig", max_restarts: int) -> None:
    """Refuse a job that would be requeued with nothing to go on from."""
    if max_restarts and not config.checkpoint.keeps:
        raise UserError(
            f"{config.source}: checkpoint.every=0 and checkpoint.last=false keep nothing that the job could go on from "
            "after its time limit or a fault; leave out last=false, set checkpoint.every, or give --max-restarts 0"
        )


def _further(given: list[str]) -> dict[str, str | None]:
    """Options of sbatch as NAME=VALUE, or NAME alone, with or without the dashes."""
    options: dict[str, str | None] = {}
    for text in given:
        name, _, value = text.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]+", name):
            raise UserError(f"--sbatch {text!r} is no long option of sbatch; write NAME=VALUE, as in --sbatch qos=high")
        if name in _OWN:
            raise UserError(f"--sbatch {text!r}: {name} is not given to sbatch as it stands; {_OWN[name]}")
        options[name] = value
    return options


def _words(container: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(container))
    except ValueError as error:
        raise UserError(f"--container {container!r} is no command line: {str(error).lower()}") from error


def _check_time(time: str | None, stop_before: int) -> None:
    """Refuse what is no time limit of sbatch's, and one that is over before the run may be asked to stop."""
    if time is None or time.upper() in ("UNLIMITED", "INFINITE"):
        return
    limit = _seconds(time)
    if limit is None:
        raise UserError(f"--time {time!r} is none of sbatch's forms; write HH:MM:SS, minutes, or days-HH:MM:SS")
    if limit <= stop_before:
        raise UserError(
            f"--time {time} is {limit} s, and the run is asked to stop --stop-before {stop_before} s before its end; "
            "give it more time, or lower --stop-before"
        )


def _seconds(time: str) -> int | None:
    """What sbatch reads of minutes, minutes:seconds, hours:minutes:seconds, and days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    numbers = rest.split(":")
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    if len(numbers) > len(units) or not all(number.isdecimal() for number in [*numbers, *([days] if dash else [])]):
        return None
    return 86400 * int(days or 0) + sum(int(number) * unit for number, unit in zip(numbers, units, strict=False))


def _require_sbatch() -> None:
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine; submit from a login node, or give --output FILE")


def _submit(script: str) -> str:
    """Return the number of the job that sbatch made of a script."""
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError("\n".join(f"Slurm: {line}" for line in done.stderr.splitlines()) or "Slurm: sbatch failed")
    return done.stdout.strip().partition(";")[0]
