"""Plots of timelines: a row for each rank, a box for each forward and backward, white where the rank idles.

Where a rank runs several stages, its first stage has the full colours and each further stage has paler colours.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megalite.pipeline.instructions import Backward, BackwardInput, BackwardWeight, Compute, Forward
from megalite.pipeline.timeline.spans import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Style(NamedTuple):
    name: str
    box: str


_STYLES: dict[type[Compute], _Style] = {
    Forward: _Style("forward", "#2f6db5"),
    Backward: _Style("backward", "#f2b04c"),
    BackwardInput: _Style("backward, input", "#d9623b"),
    BackwardWeight: _Style("backward, weights", "#3f9a5f"),
}
_REDUCTION = "#7d4fa3"
_PALEST = 0.62
"""The share of white in the colours of a rank's last stage; the first stage has full colours."""
_DARK, _GREY = "#262626", "#b9bec4"
_WIDTH, _ROW, _BOX = 14.0, 0.46, 0.84
"""The figure's width and a row's height, in inches, and the share of the row's height that boxes take."""
_LARGEST, _SMALLEST, _DIGIT = 9.5, 4.5, 0.66
"""The largest and smallest font size of microbatch numbers, in points (smaller numbers are left out), and the width
of a digit in multiples of the font size."""


def plot_timelines(timelines: Mapping[str, Timeline], path: Path, title: str) -> None:
    """Write a PNG with one panel for each named timeline, its bubble fraction and its length above it.

    Times in seconds are drawn in milliseconds since the first compute. Panels with the same unit have the same axis, so
    that a measured step and its simulation can be compared by eye. The parent folders of `path` are created. Raises
    ValueError where there is no timeline, or a timeline without a forward or backward that takes some time.
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
    figure.suptitle(title, x=0.011, ha="left", fontsize=14, fontweight="bold", color=_DARK)
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (name, timeline) in zip(panels, timelines.items(), strict=True):
        longest = max(other.makespan for other in timelines.values() if other.unit == timeline.unit)
        _draw(axes, name, timeline, longest)
    drawn = {type(span.instruction) for timeline in timelines.values() for span in timeline.compute}
    keys = [Patch(color=style.box, label=style.name) for kind, style in _STYLES.items() if kind in drawn]
    if any(timeline.reductions for timeline in timelines.values()):
        keys.append(Patch(color=_REDUCTION, label="gradient reduction"))
    most = max(len(stages) for timeline in timelines.values() for stages in timeline.stages)
    if most > 1:
        keys += [
            Patch(color=_paler(_DARK, index, most), label=f"{_ordinal(index)} stage of a rank") for index in range(most)
        ]
    options: dict[str, Any] = {
        "frameon": False,
        "fontsize": 11,
        "handlelength": 1.1,
        "handleheight": 1.1,
        "labelcolor": _DARK,
    }
    where = "upper right" if len(keys) <= 2 else "outside lower right"  # three or more would cover the title
    figure.legend(handles=keys, loc=where, ncols=len(keys), borderaxespad=0.35, **options)
    return figure


def _draw(axes: "Axes", name: str, timeline: Timeline, longest: float) -> None:
    scale, unit = (1000.0, "ms") if timeline.unit == "seconds" else (1.0, "forwards")
    points = 0.9 * 72 * _WIDTH / longest
    stages = timeline.stages
    most = max(len(of_rank) for of_rank in stages)
    for kind, style in _STYLES.items():
        for index in range(most):
            spans = [
                span
                for span in timeline.compute
                if isinstance(span.instruction, kind) and stages[span.rank].index(span.instruction.stage) == index
            ]
            _draw_boxes(axes, _paler(style.box, index, most), spans, timeline.start, scale, points=points)
    for span in timeline.reductions:
        # Beside compute, so below the boxes.
        start, width = (span.start - timeline.start) * scale, (span.end - span.start) * scale
        axes.barh(span.rank + _BOX / 2 + 0.04, width, left=start, height=0.08, color=_REDUCTION)
    axes.set_xlim(0, (longest + timeline.exposed_reduction) * scale)
    axes.set_ylim(timeline.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(timeline.num_ranks), [_row(rank, of_rank) for rank, of_rank in enumerate(stages)])
    axes.set_xlabel("time, ms" if unit == "ms" else "time, in forwards of one microbatch", color=_DARK)
    axes.set_title(name, loc="left", fontsize=12, color=_DARK)
    total = f"{timeline.makespan * scale:,.4g} {unit} in all"
    axes.set_title(f"bubble {timeline.bubble_fraction:.1%}, {total}", loc="right", fontsize=12, color=_DARK)
    axes.tick_params(axis="y", length=0, labelsize=11, labelcolor=_DARK)
    axes.tick_params(axis="x", color=_GREY, labelsize=10, labelcolor=_DARK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)


def _draw_boxes(
    axes: "Axes", colour: str, spans: Sequence[Span], origin: float, scale: float, *, points: float
) -> None:
    """Draw the boxes of one colour with their numbers; a unit of time is `points` wide."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    widths = sorted(span.end - span.start for span in spans)
    if not widths:
        return
    digits = max(len(str(span.instruction.microbatch)) for span in spans)
    common = min(_LARGEST, widths[len(widths) // 10] * points / (_DIGIT * digits))
    ink = _ink_on(colour)
    boxes = []
    for span in spans:
        start, width = (span.start - origin) * scale, span.end - span.start
        boxes.append(Rectangle((start, span.rank - _BOX / 2), width * scale, _BOX))
        number = str(span.instruction.microbatch)
        size = min(max(common, _SMALLEST), width * points / (_DIGIT * len(number)))
        if size >= _SMALLEST:
            middle = start + width * scale / 2
            axes.text(middle, span.rank, number, ha="center", va="center_baseline", fontsize=size, color=ink)
    edge = min(0.9, widths[0] * points / 6)
    axes.add_collection(PatchCollection(boxes, facecolor=colour, edgecolor="white", linewidth=edge))


def _row(rank: int, stages: Sequence[int]) -> str:
    if len(stages) == 1:
        return f"stage {stages[0]}"
    return f"rank {rank}: stages {', '.join(str(stage) for stage in stages)}" if stages else f"rank {rank}"


def _ordinal(index: int) -> str:
    return ("1st", "2nd", "3rd")[index] if index < 3 else f"{index + 1}th"


def _channels(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def _paler(colour: str, index: int, most: int) -> str:
    """Return the colour of a rank's stage, which is number `index` of at most `most` stages per rank."""
    share = _PALEST * index / max(most - 1, 1)
    return "#" + bytes(round(channel + (255 - channel) * share) for channel in _channels(colour)).hex()


def _ink_on(colour: str) -> str:
    """Return a legible colour for a number on a box: white on a dark box, else nearly black."""
    red, green, blue = _channels(colour)
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else _DARK
