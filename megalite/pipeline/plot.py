"""Draw what a pipeline did: a row for each stage, a box for each forward and backward, white where the stage idles."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megalite.pipeline.instructions import Backward, Compute, Forward
from megalite.pipeline.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Look(NamedTuple):
    name: str
    box: str
    number: str


_LOOKS: dict[type[Compute], _Look] = {
    Forward: _Look("forward", "#2f6db5", "#ffffff"),
    Backward: _Look("backward", "#f2b04c", "#3d2c0a"),
}
_INK, _RULE = "#262626", "#b9bec4"
_WIDTH, _ROW, _BOX = 14.0, 0.46, 0.84
"""The figure's width and a row's height, in inches, and the share of the row that its boxes fill."""
_LARGEST, _SMALLEST, _DIGIT = 9.5, 4.5, 0.66
"""Sizes of a microbatch number in points, where one that needs to be smaller is left out; a digit's width in sizes."""


def plot_timelines(timelines: Mapping[str, Timeline], path: Path, title: str) -> None:
    """Write a PNG with one panel for each named timeline, its bubble fraction and its length above it.

    Times in seconds are drawn in milliseconds from the first compute on, and panels that share a unit share their
    axis, so that a measured step and its simulation can be compared by eye. Folders on the way to `path` are made.
    Raises ValueError where there is no timeline, or one without a forward or backward that takes some time.
    """
    figure = timeline_figure(timelines, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=160)


def timeline_figure(timelines: Mapping[str, Timeline], title: str) -> "Figure":
    """Return the figure that `plot_timelines` writes; raise ValueError as it does."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not timelines or not all(timeline.makespan > 0 for timeline in timelines.values()):
        raise ValueError("nothing to draw: every timeline needs a forward or backward that takes some time")
    rows = [timeline.num_ranks for timeline in timelines.values()]
    figure = Figure(figsize=(_WIDTH, 0.7 + sum(_ROW * count + 0.95 for count in rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1, hspace=0.04)  # pyright: ignore
    figure.suptitle(title, x=0.011, ha="left", fontsize=14, fontweight="bold", color=_INK)
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (name, timeline) in zip(panels, timelines.items(), strict=True):
        longest = max(other.makespan for other in timelines.values() if other.unit == timeline.unit)
        _draw(axes, name, timeline, longest)
    drawn = {type(span.instruction) for timeline in timelines.values() for span in timeline.compute}
    keys = [Patch(color=look.box, label=look.name) for kind, look in _LOOKS.items() if kind in drawn]
    look = {"frameon": False, "fontsize": 11, "handlelength": 1.1, "handleheight": 1.1, "labelcolor": _INK}
    figure.legend(handles=keys, loc="upper right", ncols=len(keys), borderaxespad=0.35, **look)
    return figure


def _draw(axes: "Axes", name: str, timeline: Timeline, longest: float) -> None:
    scale, unit = (1000.0, "ms") if timeline.unit == "seconds" else (1.0, "forwards")
    for kind, look in _LOOKS.items():
        boxes = [span for span in timeline.compute if isinstance(span.instruction, kind)]
        _draw_boxes(axes, look, boxes, timeline.start, scale, points=0.9 * 72 * _WIDTH / longest)
    axes.set_xlim(0, longest * scale)
    axes.set_ylim(timeline.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(timeline.num_ranks), [f"stage {rank}" for rank in range(timeline.num_ranks)])
    axes.set_xlabel("time, ms" if unit == "ms" else "time, in forwards of one microbatch", color=_INK)
    axes.set_title(name, loc="left", fontsize=12, color=_INK)
    total = f"{timeline.makespan * scale:,.4g} {unit} in all"
    axes.set_title(f"bubble {timeline.bubble_fraction:.1%}, {total}", loc="right", fontsize=12, color=_INK)
    axes.tick_params(axis="y", length=0, labelsize=11, labelcolor=_INK)
    axes.tick_params(axis="x", color=_RULE, labelsize=10, labelcolor=_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)


def _draw_boxes(
    axes: "Axes", look: _Look, spans: Sequence[Span], origin: float, scale: float, *, points: float
) -> None:
    """Draw the boxes of one kind, a unit of time being `points` wide on paper, with their numbers."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    widths = sorted(span.end - span.start for span in spans)
    if not widths:
        return
    digits = max(len(str(span.instruction.microbatch)) for span in spans)
    common = min(_LARGEST, widths[len(widths) // 10] * points / (_DIGIT * digits))
    boxes = []
    for span in spans:
        start, width = (span.start - origin) * scale, span.end - span.start
        boxes.append(Rectangle((start, span.rank - _BOX / 2), width * scale, _BOX))
        number = str(span.instruction.microbatch)
        size = min(max(common, _SMALLEST), width * points / (_DIGIT * len(number)))
        if size >= _SMALLEST:
            middle = start + width * scale / 2
            axes.text(middle, span.rank, number, ha="center", va="center_baseline", fontsize=size, color=look.number)
    edge = min(0.9, widths[0] * points / 6)
    axes.add_collection(PatchCollection(boxes, facecolor=look.box, edgecolor="white", linewidth=edge))
