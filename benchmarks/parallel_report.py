"""What parallel.py found as tables on the console, as JSON and as Markdown."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from contenders import CONTENDERS
from machine import Machine
from report import JOB, RESULTS, Report, Row, table
from rich.table import Table
from team import Step
from variants import Variant
from workload import LAYOUTS, Job

MIB = 2**20
BUBBLES_AGREE = 0.15
"""How far a measured bubble may be from the simulated one, as a share of it."""

Grid = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""A table: title, columns, rows."""


@dataclass(frozen=True, slots=True)
class Section:
    """One group: every step of every contender, and what megalite's saw of themselves."""

    title: str
    layout: str
    job: Job
    warmup: int
    rows: tuple[Row, ...]
    bubbles: Mapping[str, Sequence[Mapping[str, float]]]
    """By contender, of each recorded step."""
    memory: Mapping[str, Sequence[Mapping[str, int]]]
    """By contender, of each rank."""

    def report(self, machine: Machine) -> Report:
        """The same steps under the arithmetic of train_step.py's report."""
        return Report(self.job, machine, "", self.warmup, self.rows)

    def grids(self, machine: Machine) -> Iterator[Grid]:
        """Every table of the section."""
        yield self.times(self.report(machine))
        yield self.ratios(self.report(machine))
        if self.bubbles:
            yield self.bubble_grid()
        if LAYOUTS[self.layout].group_size("shard") > 1:
            yield self.zero_grid()

    def tables(self, machine: Machine) -> list[Table]:
        """The tables for the console."""
        found: list[Table] = []
        for title, columns, rows in self.grids(machine):
            found.append(Table(*columns, title=f"{self.title}: {title}"))
            for row in rows:
                found[-1].add_row(*row)
        return found

    def times(self, report: Report) -> Grid:
        """Speed and memory of each contender."""
        columns = ("contender", "tokens/s", "s/step", "spread", "CPU s/step", "RSS MiB/rank", "activations MiB", "loss")
        rows: list[tuple[str, ...]] = []
        for row in self.rows:
            _, name, _, rate, seconds, spread, cpu, _, memory, loss = report.cells(row)
            held = [f"{of_rank['activations'] / MIB:.1f}" for of_rank in self.memory.get(row.contender, ())]
            rows.append((name, rate, seconds, spread, cpu, memory, " / ".join(held), loss))
        return "one step", columns, rows

    def ratios(self, report: Report) -> Grid:
        """The speed of megalite's contenders beside all others, round by round."""
        ours = [row for row in self.rows if issubclass(CONTENDERS[row.contender], Variant)]
        columns = ("against", *(row.contender for row in ours))
        rows = [(other.contender, *(speed(report, mine, other) for mine in ours)) for other in self.rows]
        return "speed, more is faster", columns, rows

    def bubble_grid(self) -> Grid:
        """Measured against simulated bubbles, medians over the recorded steps."""
        columns = ("contender", "measured", "simulated", "measured / simulated", "textbook", "most microbatches held")
        rows: list[tuple[str, ...]] = []
        for name, steps in self.bubbles.items():
            measured, simulated, textbook, held = (
                median(step[key] for step in steps)
                for key in ("measured_bubble", "simulated_bubble", "textbook_bubble", "peak_microbatches")
            )
            apart = self.bubble_ratio(name)
            shown = (f"{measured:.1%}", f"{simulated:.1%}", f"{apart:.2f}", f"{textbook:.1%}", f"{held:g}")
            rows.append((name, *shown))
        return "bubbles", columns, rows

    def bubble_ratio(self, name: str) -> float:
        """The median measured bubble of a schedule over the median simulated one."""
        measured, simulated = (
            median(step[key] for step in self.bubbles[name]) for key in ("measured_bubble", "simulated_bubble")
        )
        return measured / simulated if simulated else float("inf")

    def zero_grid(self) -> Grid:
        """Bytes a parameter of the model on a rank, as counted and as the textbook has them."""
        columns = ("bytes a parameter", "weights", "gradients", "gradients in the update", "optimizer")
        rows: list[tuple[str, ...]] = []
        for name, ranks in self.memory.items():
            stage, dtype = int(name[-1]), getattr(CONTENDERS[name], "dtype", None) or self.job.dtype
            weights, gradients, optimizer = textbook(stage, dtype, LAYOUTS[self.layout].group_size("shard"))
            kinds = ("weights", "gradients", "gradients_in_update", "optimizer")
            counted = (max(held[kind] / held["parameters"] for held in ranks) for kind in kinds)
            rows.append((f"{name}, {dtype}", *(f"{each:.2f}" for each in counted)))
            rows.append(("textbook", f"{weights:g}", f"{gradients:g}", f"{gradients:g}", f"{optimizer:g}"))
        return "memory", columns, rows

    def warnings(self, machine: Machine) -> list[str]:
        """What makes the times worthless, and bubbles that are not the simulated ones."""
        found = [f"{self.title}: {line}" for line in self.report(machine).warnings()]
        for name in self.bubbles:
            apart = self.bubble_ratio(name)
            if abs(apart - 1) > BUBBLES_AGREE:
                found.append(f"{name}: the measured bubble is {apart:.2f} times the simulated one, not 1 +- 0.15")
        return found

    def as_dict(self, machine: Machine) -> dict[str, object]:
        """The section as JSON takes it."""
        report = self.report(machine)
        return {
            "title": self.title,
            "layout": self.layout,
            "other_load_cores": report.other_load(),
            "results": [report.summary(row) for row in self.rows],
            "bubbles": dict(self.bubbles),
            "memory_bytes": dict(self.memory),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """A whole run."""

    job: Job
    machine: Machine
    command: str
    sections: tuple[Section, ...]

    def warnings(self) -> list[str]:
        """All that any section warns of."""
        return [line for section in self.sections for line in section.warnings(self.machine)]

    def other_load(self) -> float:
        """Cores that everything else on the machine kept busy, in the worst section."""
        return max(section.report(self.machine).other_load() for section in self.sections)


def speed(report: Report, mine: Row, other: Row) -> str:
    """How many times faster `mine` is than `other`; nothing for itself."""
    seconds: Callable[[Step], float] = lambda step: step.wall_seconds  # noqa: E731
    return "" if mine is other else f"{report.ratio(other, mine, seconds):.2f}x"


def textbook(stage: int, dtype: str, data_size: int) -> tuple[float, float, float]:
    """Bytes a parameter of weights, gradients and optimizer under ZeRO (arXiv:1910.02054, table 1), with AdamW.

    In bf16 the optimizer has fp32 masters beside its two moments; in fp32 the weights are the masters.
    """
    weights, gradients, optimizer = (4.0, 4.0, 8.0) if dtype == "fp32" else (2.0, 2.0, 12.0)
    share = (1.0, 1.0, 1.0, 1.0 / data_size)[stage], 1.0 if stage < 2 else 1.0 / data_size
    return weights * share[0], gradients * share[1], optimizer / (data_size if stage else 1)


def write(comparison: Comparison, name: str) -> None:
    """Leave NAME.json and NAME.md in results/."""
    RESULTS.mkdir(exist_ok=True)
    record = {
        "command": comparison.command,
        "machine": comparison.machine.as_dict(),
        "job": asdict(comparison.job),
        "warnings": comparison.warnings(),
        "sections": [section.as_dict(comparison.machine) for section in comparison.sections],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown(comparison))


METHOD = """\
Medians of {steps} steps after {warmup} to warm up, one step of each contender of a section in turn while the others
sleep; *spread* is the fastest and the slowest step, CPU seconds are those of all ranks, ratios are medians over the
rounds of the ratio within a round, *loss* is that of the first and the last step.

*RSS* is the most memory that the largest rank ever held, Python and libraries too. *Activations*, of each rank, is the
most that torch's allocator held at once during the forwards and backwards of a step beside what was there before and
beside the gradients: saved tensors, products put off, working memory, messages, and weights gathered at ZeRO-3.

*Bubble*: the share of the ranks' time, from the first forward to the last backward, in which they compute nothing.
*Measured* is the median over recorded steps; *simulated* is the same schedule played with each step's own median times
of forwards and backwards by stage, and messages that take no time; *textbook* has a forward of 1 and a backward of 2.

*Bytes a parameter*, on the larger rank, by the tensors that are there. The textbook (arXiv:1910.02054) has 2 + 2 + 12
in bf16 and 4 + 4 + 8 in fp32, with the optimizer divided by the data axis from stage 1 on, the gradients from 2, the
weights from 3. megalite differs in the gradients: it adds them up in fp32, and they stay whole on their rank until the
step ends at every stage, because it reduces them once, after the last microbatch of the pipeline, when the copies of a
tied table have been summed. *In the update* is what the optimizer is then given. At stage 3 a parameter of few elements
(`stage3_param_persistence_threshold`) stays whole beside its share.
"""


def markdown(comparison: Comparison) -> str:
    """The page of results."""
    job, machine = comparison.job, comparison.machine
    facts = JOB.format(
        load=comparison.other_load(),
        job=job,
        tied="tied" if job.tie_word_embeddings else "untied",
        millions=job.num_parameters / 1e6,
        mflops=job.flops_per_token / 1e6,
    )
    parts = [f"# Schedules, recomputation, ZeRO stages, {job.dtype}\n", f"`{comparison.command}`\n"]
    parts.append(machine.markdown() + facts)
    for section in comparison.sections:
        parts.append(f"## {section.title}\n")
        for title, columns, rows in section.grids(machine):
            parts += [f"{title.capitalize()}:\n", table(columns, rows)]
    first = comparison.sections[0]
    names = dict.fromkeys(row.contender for section in comparison.sections for row in section.rows)
    parts += ["## How\n", METHOD.format(steps=len(first.rows[0].steps) - first.warmup, warmup=first.warmup)]
    parts.append("".join(f"- `{name}`: {CONTENDERS[name].description}\n" for name in names))
    parts += [f"**{line}**\n" for line in comparison.warnings()]
    return "\n".join(parts)
