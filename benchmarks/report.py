"""The numbers of a run as tables on the console, as JSON and as Markdown."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from contenders import CONTENDERS
from machine import Machine
from rich.table import Table
from team import Step
from workload import Job

RESULTS = Path(__file__).parent / "results"
SUBJECT = "megalite"
LOSS_TOLERANCE = 0.02
QUIET_CORES = 0.1
COLUMNS = (
    "layout",
    "contender",
    "ranks x threads",
    "tokens/s",
    "s/step",
    "spread",
    "CPU s/step",
    "of peak",
    "MiB/rank",
    "loss",
)
VERSUS_COLUMNS = ("layout", SUBJECT, "against", "speed", "CPU s/step")


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one layout, with every step it took."""

    contender: str
    layout: str
    world_size: int
    threads: int
    steps: tuple[Step, ...]
    memory_mib: float


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run; the first `warmup` steps of each row count for the losses alone."""

    job: Job
    machine: Machine
    command: str
    warmup: int
    rows: tuple[Row, ...]

    def measured(self, row: Row, value: Callable[[Step], float]) -> list[float]:
        """One value of each measured step."""
        return [value(step) for step in row.steps[self.warmup :]]

    def summary(self, row: Row) -> dict[str, object]:
        """One row as JSON takes it; medians over the measured steps."""
        wall = self.measured(row, lambda step: step.wall_seconds)
        cpu = self.measured(row, lambda step: step.cpu_seconds)
        return {
            "contender": row.contender,
            "layout": row.layout,
            "ranks": row.world_size,
            "threads_per_rank": row.threads,
            "tokens_per_second": self.job.tokens_per_step / median(wall),
            "step_seconds": median(wall),
            "cpu_seconds": median(cpu),
            "memory_mib_of_largest_rank": row.memory_mib,
            "losses": [step.loss for step in row.steps],
            "every_step_seconds": wall,
            "every_cpu_seconds": cpu,
        }

    def cells(self, row: Row) -> tuple[str, ...]:
        """One row of the first table."""
        wall = sorted(self.measured(row, lambda step: step.wall_seconds))
        cpu = median(self.measured(row, lambda step: step.cpu_seconds))
        return (
            row.layout,
            row.contender,
            f"{row.world_size} x {row.threads}",
            f"{self.job.tokens_per_step / median(wall):,.0f}",
            f"{median(wall):.2f}",
            f"{wall[0]:.2f} to {wall[-1]:.2f}",
            f"{cpu:.2f}",
            f"{self.share_of_peak(median(wall)):.0%}",
            f"{row.memory_mib:,.0f}",
            f"{row.steps[0].loss:.3f} to {row.steps[-1].loss:.3f}",
        )

    def share_of_peak(self, step_seconds: float) -> float:
        """Arithmetic of a step against bare matrix products on all cores (model FLOP utilisation).

        The rate of one thread times the cores: that of all threads at once is lost to any other work meanwhile.
        """
        gflops = self.job.flops_per_token * self.job.tokens_per_step / step_seconds / 1e9
        return gflops / (self.machine.matrix_gflops[f"{self.job.dtype} on 1 thread"] * self.machine.cores)

    def versus(self) -> list[tuple[str, ...]]:
        """megalite against every peer of its layout, and against the one-process peers, round by round."""
        found: list[tuple[str, ...]] = []
        for ours in (row for row in self.rows if row.contender == SUBJECT):
            for peer in self.rows:
                if peer.contender != SUBJECT and peer.layout in {ours.layout, "one"}:
                    speed = self.ratio(peer, ours, lambda step: step.wall_seconds)
                    cpu = self.ratio(ours, peer, lambda step: step.cpu_seconds)
                    found.append(
                        (ours.layout, SUBJECT, f"{peer.contender}@{peer.layout}", f"{speed:.2f}x", f"{cpu:.2f}x")
                    )
        return found

    def ratio(self, above: Row, below: Row, value: Callable[[Step], float]) -> float:
        """The median over the rounds of the ratio within one round."""
        pairs = zip(self.measured(above, value), self.measured(below, value), strict=True)
        return median(a / b for a, b in pairs)

    def other_load(self) -> float:
        """Cores that everything else on the machine kept busy during the measured steps, on average."""
        other = sum(sum(self.measured(row, lambda step: step.other_cpu_seconds)) for row in self.rows)
        return other / sum(sum(self.measured(row, lambda step: step.wall_seconds)) for row in self.rows)

    def tables(self) -> list[Table]:
        """The tables for the console."""
        first = Table(*COLUMNS, title=f"one step of {self.job.tokens_per_step:,} tokens, {self.job.dtype}")
        for before, row in pairwise((None, *self.rows)):
            if before is not None and row is not None and before.layout != row.layout:
                first.add_section()
            if row is not None:
                first.add_row(*self.cells(row))
        second = Table(*VERSUS_COLUMNS, title="speed: more is faster; CPU: less is cheaper")
        for line in self.versus():
            second.add_row(*line)
        return [first, second] if second.row_count else [first]

    def warnings(self) -> list[str]:
        """What makes a result worthless: contenders that did not train the same job or at all, and a busy machine."""
        found: list[str] = []
        ends = [row.steps[-1].loss for row in self.rows]
        for row, loss in zip(self.rows, ends, strict=True):
            label = f"{row.contender}@{row.layout}"
            if not abs(loss - median(ends)) <= LOSS_TOLERANCE * median(ends):
                found.append(f"{label}: the last loss {loss:.3f} is not that of the others, {median(ends):.3f}")
            if not loss < row.steps[0].loss:
                found.append(f"{label}: the loss did not fall")
        if self.other_load() > QUIET_CORES:
            found.append(f"the machine was busy: {self.other_load():.2f} cores did other work; trust no time here")
        return found


def write(report: Report, name: str) -> None:
    """Leave NAME.json and NAME.md in results/."""
    RESULTS.mkdir(exist_ok=True)
    record = {
        "command": report.command,
        "machine": report.machine.as_dict(),
        "job": asdict(report.job),
        "warmup": report.warmup,
        "other_load_cores": report.other_load(),
        "warnings": report.warnings(),
        "results": [report.summary(row) for row in report.rows],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown(report))


METHOD = """\
Medians of {steps} steps after {warmup} to warm up, one step of each contender in turn while all others sleep; *spread*
is the fastest and the slowest step; CPU seconds are those of all ranks; *of peak* is the job's arithmetic against the
matrix rate of one thread times the cores; ratios are medians over the rounds of the ratio within a round; *loss* is
that of the first and the last step.
"""
JOB = """\
- everything else on the machine kept {load:.2f} cores busy meanwhile
- job: Llama, hidden {job.hidden_size}, {job.num_hidden_layers} layers, {job.num_attention_heads} heads, intermediate
  {job.intermediate_size}, vocabulary {job.vocab_size}, {tied} head, {millions:.1f}M parameters; sequence
  {job.sequence_length}, global batch {job.global_batch_size}, micro-batch {job.micro_batch_size}; AdamW,
  clipping {job.gradient_clipping}; {mflops:.0f} MFLOP a token
"""


def markdown(report: Report) -> str:
    """The page of results."""
    job = report.job
    names = dict.fromkeys(row.contender for row in report.rows)
    versus = report.versus()
    facts = JOB.format(
        load=report.other_load(),
        job=job,
        tied="tied" if job.tie_word_embeddings else "untied",
        millions=job.num_parameters / 1e6,
        mflops=job.flops_per_token / 1e6,
    )
    parts = [
        f"# One training step, {job.dtype}\n",
        f"`{report.command}`\n",
        report.machine.markdown() + facts,
        table(COLUMNS, [report.cells(row) for row in report.rows]),
        *([table(VERSUS_COLUMNS, versus)] if versus else []),
        METHOD.format(steps=len(report.rows[0].steps) - report.warmup, warmup=report.warmup),
        "".join(f"- `{name}`: {CONTENDERS[name].description}\n" for name in names),
        *(f"**{line}**\n" for line in report.warnings()),
    ]
    return "\n".join(parts)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
