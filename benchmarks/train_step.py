"""Tokens a second and CPU seconds a step: megalite beside DeepSpeed and plain torch, in one run, step by step in turn.

    python benchmarks/train_step.py                                  # everything, about five minutes on two cores
    python benchmarks/train_step.py --layouts pp2 dp2 --steps 12
    python benchmarks/train_step.py --contenders torch deepspeed-zero1 --dtype fp32
    python benchmarks/train_step.py --tiny --steps 3                 # does every contender still run? a minute

All ranks of all contenders stay alive; one contender runs exactly one step while the others sleep, and the order turns
by one every round, so that whatever else the machine does hits all alike. Ratios are medians over the rounds of the
two steps of one round.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from contenders import ALWAYS, CONTENDERS
from machine import describe
from report import Report, Row, write
from rich.console import Console
from rich.progress import track
from team import Step, Team, TeamError
from workload import DTYPES, LAYOUTS, Job

TINY = Job(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=176, vocab_size=512, lr=1e-2)


def main() -> None:
    """Measure, print the tables and write results/train_step.{json,md}; with --tiny only print."""
    arguments = parse(sys.argv[1:])
    console = Console(width=None if sys.stdout.isatty() else 150)
    job = replace(TINY if arguments.tiny else Job(), dtype=arguments.dtype, tie_word_embeddings=arguments.tied)
    pairs = [
        (name, layout)
        for layout in arguments.layouts
        for name in arguments.contenders
        if layout in CONTENDERS[name].layouts
    ]
    if not pairs:
        sys.exit("train_step: none of these contenders runs at any of these layouts")
    machine = describe()
    with tempfile.TemporaryDirectory(prefix="megalite-benchmark-") as logs, ExitStack() as stack:
        try:
            teams = start(pairs, job, Path(logs), stack, console)
            rounds = measure(teams, arguments.warmup, arguments.steps, console)
        except TeamError as error:
            sys.exit(f"train_step: {error}")
    rows = [
        Row(team.contender.name, team.layout, team.world_size, team.threads, tuple(steps), max(team.memory_mib))
        for team, steps in zip(teams, rounds, strict=True)
    ]
    report = Report(job, machine.fastest(describe()), command(arguments), arguments.warmup, tuple(rows))
    for table in report.tables():
        console.print(table)
    for line in report.warnings():
        console.print(line, style="bold red")
    if not arguments.tiny:
        write(report, arguments.output)


def start(pairs: Sequence[tuple[str, str]], job: Job, logs: Path, stack: ExitStack, console: Console) -> list[Team]:
    """Start the teams one after another: a machine of two cores cannot import torch sixteen times at once."""
    teams: list[Team] = []
    for name, layout in track(pairs, "starting the ranks", console=console, transient=True):
        teams.append(stack.enter_context(Team(CONTENDERS[name], layout, job, logs)))
        teams[-1].wait_until_ready()
    return teams


def measure(teams: Sequence[Team], warmup: int, steps: int, console: Console) -> list[list[Step]]:
    """One step of each team in turn, `warmup` + `steps` times; the steps of each team, those to warm up included."""
    rounds: list[list[Step]] = [[] for _ in teams]
    for turn in track(range(warmup + steps), "stepping in turn", console=console, transient=True):
        for place in range(len(teams)):
            index = (place + turn) % len(teams)
            rounds[index].append(teams[index].step())
    return rounds


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = [contender.name for contender in ALWAYS]
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each contender")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, dropped")
    parser.add_argument("--contenders", nargs="+", default=default, choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--tied", action="store_true", help="tie the head to the embedding")
    parser.add_argument("--tiny", action="store_true", help="a model of a moment: prints, writes nothing")
    parser.add_argument("--output", default="train_step", help="name of the two files in results/")
    parser.epilog = "contenders: " + "; ".join(f"{name} ({c.description})" for name, c in CONTENDERS.items())
    return parser.parse_args(words)


def command(arguments: argparse.Namespace) -> str:
    """The command that repeats this run."""
    words = ["python benchmarks/train_step.py", f"--steps {arguments.steps} --warmup {arguments.warmup}"]
    words += [f"--contenders {' '.join(arguments.contenders)}", f"--layouts {' '.join(arguments.layouts)}"]
    words += [f"--dtype {arguments.dtype}", *(["--tied"] if arguments.tied else [])]
    return " ".join(words)


if __name__ == "__main__":
    main()
