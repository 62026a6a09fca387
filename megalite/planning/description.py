"""The description of a plan for the console: summary, rank map with parameters and memory, simulated pipeline."""

from dataclasses import dataclass, replace
from math import prod

from rich.console import Group, RenderableType
from rich.table import Table

from megalite.data.batch_schedule import BatchSchedule
from megalite.parallel.layout import format_ranges
from megalite.pipeline.schedules import SCHEDULES, all_streams
from megalite.pipeline.timeline.simulator import simulate
from megalite.planning.memory_estimate import rank_bytes, unit_for
from megalite.planning.parameter_count import ParameterCounts
from megalite.planning.plan import Plan

_LISTED = 4
"""The rank map lists up to this many pipeline ranks one by one; of more, equal ranks share a row."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the rank map: ranks with the same number of layers and parameters, `trained` of them not frozen."""

    ranks: tuple[int, ...]
    layers: str
    parameters: int
    trained: int


def describe(plan: Plan) -> RenderableType:
    """Return the summary, the rank map with parameters and memory, and the simulated pipeline, for the console."""
    return Group(_summary(plan), _rank_map(plan), _pipeline(plan))


def _summary(plan: Plan) -> str:
    config, train = plan.config, plan.config.train
    tokens = BatchSchedule(train).consumed(train.steps) * config.data.sequence_length
    ramp = train.batch_size_rampup
    sizes = f"{train.global_batch_size:,}" if ramp is None else f"{ramp.start:,} to {train.global_batch_size:,}"
    return (
        f"{config.source.name}: {config.model.architecture}, {plan.layout}, {plan.layout.world_size} ranks, "
        f"{config.sharding}, {config.precision}\n"
        f"{train.steps:,} steps x {sizes} sequences x {config.data.sequence_length:,} tokens "
        f"= {tokens:,} tokens; {config.gradient_accumulation_steps:,} microbatches of "
        f"{_sequences(train.micro_batch_size)} per rank and step"
    )


def _rank_map(plan: Plan) -> Table:
    counts = ParameterCounts(plan)
    rows = [(row, rank_bytes(plan.config, row.parameters, row.trained)) for row in _rows(plan, counts)]
    unit, size = unit_for(max(held.total for _, held in rows))
    table = Table(title=f"what a rank holds, in {unit}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    left = ("ranks", "stages: layers")
    for column in (*left, "parameters", "weights", "gradients", "reduction", "optimizer", "sum"):
        table.add_column(column, justify="left" if column in left else "right", no_wrap=column not in left)
    for row, held in rows:
        sizes = held.weights, held.gradients, held.reduction, held.optimizer, held.total
        shown = [f"{number / size:,.2f}" for number in sizes]
        table.add_row(format_ranges(row.ranks), row.layers, f"{row.parameters / 1e6:,.1f} M", *shown)
    total = sum(map(counts.of_rank, _one_copy(plan))) * plan.layout.group_size("gradient")
    frozen = sum(prod(plan.shapes[name]) for name in plan.frozen)
    notes = [
        f"{sum(map(prod, plan.shapes.values())):,} parameters in the model, {total:,} on its ranks",
        "(norms, tied tables and replicas stand on several)",
        *([f"{frozen:,} parameters of the model are frozen"] if frozen else []),
        "bytes by arithmetic, without activations and what the device's libraries take",
    ]
    if offloaded := max(held.offloaded for _, held in rows):
        notes.append(f"off the device: up to {offloaded / size:,.2f} {unit} more for each rank")
    table.caption = "\n".join(notes)
    table.caption_justify = "left"
    return table


def _one_copy(plan: Plan) -> tuple[int, ...]:
    """Return the ranks that together hold one copy of the model."""
    return plan.layout.groups_by("model")[0]


def _rows(plan: Plan, counts: ParameterCounts) -> list[_Row]:
    """Group ranks with the same layers and number of parameters into rows of the rank map."""
    rows: list[_Row] = []
    copies = {ranks[0]: ranks for ranks in plan.layout.groups_by("gradient")}
    for first in _one_copy(plan):
        ranks = copies[first]
        stages_of = plan.placement.stages_of(plan.layout.index(first, "pipeline"))
        stages = [(stage, plan.stage_layers[stage]) for stage in stages_of]
        numbers = ", ".join(str(stage) for stage, _ in stages)
        layers = f"{numbers}: {', '.join(f'{layers.start}-{layers.stop - 1}' for _, layers in stages)}"
        if plan.layout.size("pipeline") > _LISTED:
            layers = f"{' + '.join(str(len(layers)) for _, layers in stages)} layers"
        row = _Row(ranks, layers, counts.of_rank(first), counts.of_rank(first, trained=True))
        alike = [at for at, other in enumerate(rows) if replace(other, ranks=ranks) == row]
        if alike:
            rows[alike[0]] = replace(row, ranks=tuple(sorted((*rows[alike[0]].ranks, *ranks))))
        else:
            rows.append(row)
    return rows


def _pipeline(plan: Plan) -> str:
    schedule, microbatches = plan.config.parallel.schedule, plan.config.gradient_accumulation_steps
    if plan.layout.size("pipeline") == 1:
        return "no pipeline: every rank runs all layers"
    timeline = simulate(all_streams(SCHEDULES[schedule], plan.placement, microbatches))
    stages = f"{plan.placement.num_stages} stages"
    if plan.placement.virtual_stages > 1:
        stages += f", {plan.placement.virtual_stages} per rank"
    return (
        f"pipeline {schedule}: {stages}, {microbatches} microbatches, simulated bubble "
        f"{timeline.bubble_fraction:.1%}, at most {max(timeline.peak_microbatches):g} microbatches in flight"
    )


def _sequences(count: int) -> str:
    return "1 sequence" if count == 1 else f"{count} sequences"
