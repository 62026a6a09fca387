"""Render a self-contained batch script for one run from a launcher's template."""

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
"""The launchers that can start ranks in containers: DeepSpeed's runs outside and starts ranks with its own Python."""

_OPTION = re.compile(r"#SBATCH --(?P<name>[a-z-]+)(?:=(?P<value>.*))?")
_SOURCE = re.compile(r'source "\$SLURM_SUBMIT_DIR/slurm/(?P<file>[a-z_.]+)"')


@dataclass(frozen=True, slots=True)
class Job:
    """The values from which a batch script is rendered.

    `arguments` are those of the template: the run's folder, its run file, overrides. `options` are sbatch's, by long
    name, and override the template's; None removes an option and "" gives it without a value. `path` is the folder of
    ``python`` and ``megalite``; `container` has the words before ``python``.
    """

    launcher: str
    arguments: tuple[str, ...]
    options: Mapping[str, str | None]
    path: str
    max_restarts: int
    container: tuple[str, ...] = ()


def render(job: Job) -> str:
    """Return the batch script of a job.

    Raises UserError for a container with a launcher that supports none, and for an option that sbatch would misread.
    """
    if job.container and job.launcher not in IN_CONTAINERS:
        raise UserError(
            f"--container {shlex.join(job.container)!r}: DeepSpeed's launcher starts ranks with its own Python, "
            f"outside of the container; use --launcher {' or '.join(IN_CONTAINERS)}"
        )
    lines = _template(LAUNCHERS[job.launcher])
    title = lines[1]
    defaults = {found["name"]: found["value"] or "" for line in lines if (found := _OPTION.fullmatch(line))}
    body = lines[next(at for at, line in enumerate(lines) if line.startswith("source ")) :]
    options = _options({**defaults, **job.options})
    return "\n".join(["#!/bin/bash", title, *options, "", *_settings(job), *_inline_sources(body)])


def _template(name: str) -> list[str]:
    return files("megalite.slurm").joinpath("templates", name).read_text(encoding="utf-8").split("\n")


def _options(options: Mapping[str, str | None]) -> Iterator[str]:
    for name, value in options.items():
        if value is None:
            continue
        # sbatch splits a line at blanks, and ends it at a comment sign.
        if not re.fullmatch(r"[\w.,:@%+=/*()\[\]&|-]*", value, re.ASCII):
            raise UserError(
                f"--{name}={value!r}: sbatch would not read this as a single value; leave out blanks and quotes"
            )
        yield f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"


def _settings(job: Job) -> Iterator[str]:
    yield f"set -- {shlex.join(job.arguments)}"
    yield f'export PATH={shlex.quote(job.path)}:"$PATH"'
    yield f"MAX_RESTARTS={job.max_restarts}"
    yield f"container=({shlex.join(job.container)})"
    yield ""


def _inline_sources(lines: list[str]) -> Iterator[str]:
    """Yield the lines, with the content of sourced template files in place of the ``source`` lines."""
    for line in lines:
        found = _SOURCE.fullmatch(line)
        if found:
            yield from _inline_sources(_template(found["file"]))
        else:
            yield line
