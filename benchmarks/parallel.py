"""Schedules, recomputation, sequence parallelism and ZeRO stages side by side, and beside their peers.

    python benchmarks/parallel.py                                    # everything, about twenty minutes on two cores
    python benchmarks/parallel.py --groups schedules zero --steps 12
    python benchmarks/parallel.py --tiny --steps 2                   # does every contender still run? some minutes

One group of contenders after the other; within a group step by step in turn, as train_step.py does. Then megalite's own
contenders look at themselves: bubbles measured and simulated, and the memory of activations, weights, gradients and
optimizer.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from contenders import CONTENDERS
from machine import describe
from parallel_report import Comparison, Section, write
from report import Row
from rich.console import Console
from rich.progress import track
from team import Team, TeamError
from train_step import TINY, measure, start
from variants import Variant
from workload import DTYPES, Job

JOB = Job(micro_batch_size=1)
"""train_step.py's, in eight microbatches: enough for two stages a rank to take turns."""


@dataclass(frozen=True, slots=True)
class Group:
    """Contenders at one layout that are told apart by one thing."""

    title: str
    layout: str
    contenders: tuple[str, ...]
    has_bubble: bool = False


GROUPS = {
    "schedules": Group(
        "Schedules, pipeline 2",
        "pp2",
        (
            "megalite-gpipe",
            "megalite-1f1b",
            "megalite-interleaved",
            "megalite-zb-h1",
            "megalite-zb-v",
            "deepspeed-pipeline",
            "torch-gpipe",
            "torch-pipelining",
            "torch-interleaved",
            "torch-zbv",
        ),
        has_bubble=True,
    ),
    "recompute": Group("Recomputation, pipeline 2", "pp2", ("megalite-1f1b", "megalite-selective", "megalite-full")),
    "sequence": Group(
        "Sequence parallelism, tensor 2", "tp2", ("megalite-tensor", "megalite-sequence", "torch-dtensor")
    ),
    "zero": Group(
        "ZeRO stages, data 2",
        "dp2",
        (
            *(f"megalite-zero{stage}" for stage in range(4)),
            *(f"deepspeed-zero{stage}" for stage in (1, 2, 3)),
            "torch",
        ),
    ),
}


def main() -> None:
    """Measure, print the tables and write results/parallel.{json,md}; with --tiny only print."""
    arguments = parse(sys.argv[1:])
    console = Console(width=None if sys.stdout.isatty() else 170)
    tiny = replace(TINY, num_hidden_layers=4, micro_batch_size=1)
    job = replace(tiny if arguments.tiny else JOB, dtype=arguments.dtype)
    machine = describe()
    sections: list[Section] = []
    for name in arguments.groups:
        try:
            sections.append(compare(GROUPS[name], job, arguments, console))
        except TeamError as error:
            sys.exit(f"parallel: {error}")
        for table in sections[-1].tables(machine):
            console.print(table)
    comparison = Comparison(job, machine.fastest(describe()), command(arguments), tuple(sections))
    for line in comparison.warnings():
        console.print(line, style="bold red")
    if not arguments.tiny:
        write(comparison, arguments.output)


def compare(group: Group, job: Job, arguments: argparse.Namespace, console: Console) -> Section:
    """Time the contenders of a group in turn, then have megalite's look at themselves."""
    pairs = [(name, group.layout) for name in group.contenders if name not in arguments.without]
    with tempfile.TemporaryDirectory(prefix="megalite-benchmark-") as logs, ExitStack() as stack:
        teams = start(pairs, job, Path(logs), stack, console)
        rounds = measure(teams, arguments.warmup, arguments.steps, console)
        rows = [
            Row(team.contender.name, team.layout, team.world_size, team.threads, tuple(steps), max(team.memory_mib))
            for team, steps in zip(teams, rounds, strict=True)
        ]
        variants = [team for team in teams if issubclass(team.contender, Variant)]
        bubbles = observe_bubbles(variants, arguments.timelines, console) if group.has_bubble else {}
        memory = {team.contender.name: team.observe("memory") for team in variants}
    return Section(group.title, group.layout, job, arguments.warmup, tuple(rows), bubbles, memory)


def observe_bubbles(teams: Sequence[Team], count: int, console: Console) -> dict[str, list[dict[str, float]]]:
    """Record `count` steps of each team, in turn."""
    found: dict[str, list[dict[str, float]]] = {team.contender.name: [] for team in teams}
    for _ in track(range(count), "recording timelines", console=console, transient=True):
        for team in teams:
            found[team.contender.name].append(team.observe("timeline")[0])
    return found


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each contender")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, dropped")
    parser.add_argument("--timelines", type=int, default=5, help="recorded steps of each schedule")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS), metavar="GROUP")
    parser.add_argument("--without", nargs="+", default=[], choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--tiny", action="store_true", help="a model of a moment: prints, writes nothing")
    parser.add_argument("--output", default="parallel", help="name of the two files in results/")
    parser.epilog = "groups: " + "; ".join(f"{name} ({', '.join(group.contenders)})" for name, group in GROUPS.items())
    return parser.parse_args(words)


def command(arguments: argparse.Namespace) -> str:
    """The command that repeats this run."""
    words = [f"python benchmarks/parallel.py --steps {arguments.steps} --warmup {arguments.warmup}"]
    words += [f"--timelines {arguments.timelines} --groups {' '.join(arguments.groups)} --dtype {arguments.dtype}"]
    words += [f"--without {' '.join(arguments.without)}"] if arguments.without else []
    return " ".join(words)


if __name__ == "__main__":
    main()
