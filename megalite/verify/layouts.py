"""The layouts that a verification compares, and the one-step run of each layout."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from megalite.config import ScheduleSection
from megalite.config.deepspeed.settings import DeepSpeedSettings
from megalite.config.sections import CheckpointSection, ParallelSection
from megalite.errors import UserError
from megalite.parallel.layout import ParallelLayout
from megalite.planning.plan import Plan, plan_of

_OF_A_PIPELINE = ("schedule", "virtual_stages", "stage_layers")
_OF_A_TENSOR_AXIS = ("sequence_parallel",)

_LEFT_OUT = (
    # Precisions: the comparison is in fp32.
    *("bf16", "fp16", "data_types", "communication_data_type"),
    # Warm-up: at a small learning rate the update of a weight near 1 is lost in rounding.
    "scheduler",
)


def layouts_of(target: ParallelLayout) -> tuple[ParallelLayout, ...]:
    """Return the layouts to compare: each axis of several ranks alone, then the whole layout."""
    alone = [target.resized(**{axis: target.size(axis)}) for axis in target.names if target.size(axis) > 1]
    return tuple(dict.fromkeys([*alone, target]))


def read_layouts(text: str) -> tuple[ParallelLayout, ...]:
    """Parse ``2x1x1,2x2x2``: tensor, pipeline and data of each layout; raise UserError for an invalid layout."""
    found, one_rank = [], ParallelLayout()
    axes = one_rank.names
    for word in text.split(","):
        sizes = word.strip().lower().split("x")
        if len(sizes) != len(axes) or not all(size.isdecimal() and int(size) for size in sizes):
            example = write_layout(one_rank.resized(**{axes[0]: 2}))
            raise UserError(f"--layouts: {word.strip()!r} is not a layout; write {' x '.join(axes)}, such as {example}")
        found.append(one_rank.resized(**dict(zip(axes, map(int, sizes), strict=True))))
    return tuple(dict.fromkeys(found))


def write_layout(layout: ParallelLayout) -> str:
    """Format a layout as `read_layouts` parses it."""
    return "x".join(str(layout.size(axis)) for axis in layout.names)


def case_plan(target: Plan, layout: ParallelLayout, folder: Path) -> Plan:
    """Return a plan for the first step of `target` with `layout`, in fp32, at the full learning rate, in `folder`.

    Model, data, batch, ZeRO stage and offloading are the target's. Settings that need a pipeline or a tensor axis are
    reset if the layout has none. Raises UserError if the model or the batch does not fit the layout.
    """
    config = target.config
    left_out = () if layout.size("pipeline") > 1 else _OF_A_PIPELINE
    left_out += () if layout.size("tensor") > 1 else _OF_A_TENSOR_AXIS
    parallel: dict[str, Any] = {name: ParallelSection.model_fields[name].default for name in left_out}
    if layout.size("pipeline") != target.layout.size("pipeline"):
        parallel["stage_layers"] = None
    parallel |= {axis: layout.size(axis) for axis in layout.names}
    case = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": folder}),
            "parallel": config.parallel.model_copy(update=parallel),
            "train": config.train.model_copy(
                update={
                    "precision": "fp32",
                    "schedule": ScheduleSection(name="constant"),
                    "stop_after": 1,
                    "eval_every": 0,
                    "trace_steps": (),
                }
            ),
            "checkpoint": CheckpointSection(last=False),
            "resume": "never",
            "deepspeed": _in_fp32(config.deepspeed),
        }
    )
    return plan_of(case.resolve(world_size=layout.world_size, vocab_size=None), target.tokenizer_digest)


def _in_fp32(settings: DeepSpeedSettings) -> DeepSpeedSettings:
    # The JSON may restate values derived from the target's batch and layout, which this layout does not have.
    document = {k: value for k, value in settings.without_derived().document.items() if k not in _LEFT_OUT}
    if "zero_optimization" in document:
        document["zero_optimization"] = {
            name: _in_memory(value) if name.startswith("offload_") else value
            for name, value in document["zero_optimization"].items()
        }
    return replace(settings, document=document)


def _in_memory(offload: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace offloading to NVMe, which the comparison cannot read, by offloading to host memory."""
    return {"device": "cpu"} if offload.get("device") == "nvme" else offload


def require_ranks(layouts: Sequence[ParallelLayout], started: int) -> None:
    """Raise UserError if a layout needs more ranks than a launcher started."""
    for layout in layouts:
        if layout.world_size > started:
            raise UserError(
                f"--layouts: {write_layout(layout)} needs {layout.world_size} ranks, but {started} were started; "
                f"start {max(each.world_size for each in layouts)} ranks, or leave the layout out"
            )


def require_cores(plan: Plan, layouts: Sequence[ParallelLayout], limit: int, cores: int) -> None:
    """Raise UserError, with smaller layouts to use, if a layout needs more than `limit` ranks on this machine."""
    large = [layout for layout in layouts if layout.world_size > limit]
    if not large:
        return
    most = max(large, key=lambda layout: layout.world_size)
    smaller = ",".join(map(write_layout, smaller_layouts(plan, limit)))
    raise UserError(
        f"{plan.config.source}: {most} needs {most.world_size:,} ranks, each a process on this machine of "
        f"{cores:,} cores; the limit is {limit:,} processes; "
        + (f"compare smaller layouts with --layouts {smaller}, " if smaller else "")
        + "use the ranks of a launcher, or start more processes with --oversubscribe"
    )


def smaller_layouts(plan: Plan, limit: int) -> tuple[ParallelLayout, ...]:
    """Return layouts of at most `limit` ranks in which axes of several ranks have two ranks, alone and combined.

    Layouts that the run's own settings do not allow are left out.
    """
    whole = plan.layout
    found = []
    for sizes in product(*((1, 2) if whole.size(axis) > 1 else (1,) for axis in whole.names)):
        layout = whole.resized(**dict(zip(whole.names, sizes, strict=True)))
        if 1 < layout.world_size <= limit and layout != whole:
            with suppress(UserError):
                case_plan(plan, layout, plan.config.run.dir)
                found.append(layout)
    return tuple(sorted(found, key=lambda layout: layout.world_size))
