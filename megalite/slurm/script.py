"""A batch script for one run, whole in itself, made of a template that takes any run."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files

from megalite.errors import UserError

LAUNCHERS: Mapping[str, str] = {
    "deepspeed": "deepspeed_pdsh.sbatch",
    "deepspeed-slurm": "deepspeed_slurm.sbatch",
    "srun": "srun.sbatch",
    "torchrun": "torchrun.sbatch",
}
"""The template of each launcher."""

IN_CONTAINERS = ("srun", "torchrun")
"""DeepSpeed's launcher runs outside of a container, and would start the ranks by its own Python."""

_OPTION = re.compile(r"#SBATCH --(?P<name>[a-z-]+)(?:=(?P<value>.*))?")
_SOURCE = re.compile(r'source "\$SLURM_SUBMIT_DIR/slurm/(?P<file>[a-z_.]+)"')


@dataclass(frozen=True, slots=True)
class Job:
    """What a batch script is rendered of.

    `arguments` are those of the template: the run's folder, its run file, overrides. `options` are sbatch's, by their
    long names, and go before the template's; a value of None takes an option away and "" gives it without a value.
    `path` is where the job finds ``python`` and ``megalite``; `container` the words in front of ``python``.
    """

    launcher: str
    arguments: tuple[str, ...]
    options: Mapping[str, str | None]
    path: str
    max_restarts: int
    container: tuple[str, ...] = ()


def render(job: Job) -> str:
    """Return the batch script of a job.

    Raises UserError for a container where the launcher takes none, and for an option that sbatch would misread.
    """
    if job.container and job.launcher not in IN_CONTAINERS:
        raise UserError(
            f"--container {shlex.join(job.container)!r}: DeepSpeed's launcher starts ranks by its own Python, "
            f"outside of it; use --launcher {' or '.join(IN_CONTAINERS)}"
        )
    lines = _template(LAUNCHERS[job.launcher])
    title = lines[1]
    defaults = {found["name"]: found["value"] or "" for line in lines if (found := _OPTION.fullmatch(line))}
    body = lines[next(at for at, line in enumerate(lines) if line.startswith("source ")) :]
    return "\n".join(["#!/bin/bash", title, *_options({**defaults, **job.options}), "", *_settings(job), *_whole(body)])


def _template(name: str) -> list[str]:
    return files("megalite.slurm").joinpath("templates", name).read_text(encoding="utf-8").split("\n")


def _options(options: Mapping[str, str | None]) -> Iterator[str]:
    for name, value in options.items():
        if value is None:
            continue
        # sbatch splits a line at blanks, and ends it at a mark of a comment.
        if not re.fullmatch(r"[\w.,:@%+=/*()\[\]&|-]*", value, re.ASCII):
            raise UserError(f"--{name}={value!r}: sbatch would not read this as one value; leave out blanks and quotes")
        yield f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"


def _settings(job: Job) -> Iterator[str]:
    yield f"set -- {shlex.join(job.arguments)}"
    yield f'export PATH={shlex.quote(job.path)}:"$PATH"'
    yield f"MAX_RESTARTS={job.max_restarts}"
    yield f"container=({shlex.join(job.container)})"
    yield ""


def _whole(lines: list[str]) -> Iterator[str]:
    """The lines, with the files that they source in place."""
    for line in lines:
        found = _SOURCE.fullmatch(line)
        if found:
            yield from _whole(_template(found["file"]))
        else:
            yield line
