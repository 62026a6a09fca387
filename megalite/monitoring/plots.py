"""Plots of a run's metrics and of a corpus's document lengths, as PNG files."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megalite.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _RULE, _GRID = "#262626", "#b9bec4", "#e9ebee"
_RAW, _TRAINING, _BASELINE = "#9dbbe0", "#2f6db5", "#6b7178"
_VALIDATION = ("#d1495b", "#e08e2b", "#7a4fa3", "#3b8e7e", "#a3762f", "#c05a9d")
_NORM, _RATE = "#8d6bb0", "#2f7d59"


class Curve(NamedTuple):
    """A quantity over the run: positions in tokens or steps, and finite values."""

    positions: list[float]
    values: list[float]


def loss_curve(metrics_path: Path, output: Path, *, baseline: float | None = None, baseline_name: str = "") -> None:
    """Plot a run's losses, learning rate and gradient norm from its ``metrics.jsonl``, and write a PNG.

    Losses are in nats per token. The horizontal axis is in tokens if the file's token counts increase, otherwise in
    steps. If a step occurs twice, as after a resume, its later line counts. Lines cut off by a crash are left out, as
    are losses that are not finite. `baseline` is a loss for comparison, such as the unigram entropy of the corpus;
    `baseline_name` is its label.

    Raises UserError if the file cannot be read or has no training loss.
    """
    figure = loss_figure(metrics_path, baseline=baseline, baseline_name=baseline_name)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="png", dpi=160)


def loss_figure(metrics_path: Path, *, baseline: float | None = None, baseline_name: str = "") -> "Figure":
    """Return the figure that `loss_curve` writes; raises UserError as `loss_curve` does."""
    from matplotlib.figure import Figure

    training, evaluations = _read(metrics_path)
    axis_name, position = _axis(training)
    losses = _curve(training, "loss", position)
    if not losses.values:
        raise UserError(f"{metrics_path}: no line has a finite training loss; plot it after a step is done")
    figure = Figure(figsize=(10.0, 6.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.03)  # pyright: ignore
    title = f"Training of {metrics_path.resolve().parent.name}"
    figure.suptitle(title, x=0.015, ha="left", fontsize=14, fontweight="bold", color=_INK)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    valid = {name: _curve(entries, "valid_loss", position) for name, entries in evaluations.items()}
    _draw_losses(upper, losses, valid, baseline, baseline_name)
    _draw_norm_and_rate(lower, _curve(training, "grad_norm", position), _curve(training, "learning_rate", position))
    _finish_axis(lower, axis_name, max(losses.positions))
    return figure


_Entries = dict[int, dict[str, Any]]


def _read(path: Path) -> tuple[_Entries, dict[str, _Entries]]:
    """Return the training lines by step, and the evaluation lines by validation set and step, sorted by step."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a run's metrics.jsonl") from error
    training: _Entries = {}
    evaluations: dict[str, _Entries] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            if "loss" in entry:
                training[entry["step"]] = entry
            if "valid_loss" in entry:
                evaluations.setdefault(str(entry.get("valid_set", "")), {})[entry["step"]] = entry
    return dict(sorted(training.items())), {name: dict(sorted(of.items())) for name, of in evaluations.items()}


def _axis(training: Mapping[int, Mapping[str, Any]]) -> tuple[str, Mapping[int, float]]:
    """Return the unit of the horizontal axis, and the position of step 0 and of each training step."""
    tokens = [entry.get("tokens") for entry in training.values()]
    counts = [count for count in tokens if isinstance(count, int)]
    counted_up = len(counts) == len(tokens) and all(a < b for a, b in zip(counts, counts[1:], strict=False))
    if counted_up:
        return "tokens", {0: 0.0, **dict(zip(training, map(float, counts), strict=True))}
    return "step", {0: 0.0, **{step: float(step) for step in training}}


def _curve(entries: Mapping[int, Mapping[str, Any]], key: str, position: Mapping[int, float]) -> Curve:
    curve = Curve([], [])
    for step, entry in entries.items():
        value = entry.get(key)
        if step in position and isinstance(value, int | float) and math.isfinite(value):
            curve.positions.append(position[step])
            curve.values.append(float(value))
    return curve


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the running mean over `width` (odd) values around each value, over fewer values near the ends.

    Near the start the window shrinks on both sides, to stay centred where the loss falls fastest. Near the end it
    shrinks only on the right, to stay smooth where the loss is flat.
    """
    sums = list(accumulate(values, initial=0.0))
    means = []
    for index in range(len(values)):
        behind = min(width // 2, index)
        ahead = min(behind, len(values) - 1 - index)
        means.append((sums[index + ahead + 1] - sums[index - behind]) / (ahead + behind + 1))
    return means


def _draw_losses(
    axes: "Axes", losses: Curve, valid: Mapping[str, Curve], baseline: float | None, baseline_name: str
) -> None:
    _style(axes)
    axes.set_ylabel("loss, nats per token", color=_INK)
    width = 2 * (len(losses.values) // 50) + 1
    name = "training loss"
    if width > 1:
        _line(axes, losses, color=_RAW, linewidth=0.9, label=f"{name}, each step")
        name += f", mean over {width} steps"
    smooth = Curve(losses.positions, _running_mean(losses.values, width))
    _line(axes, smooth, color=_TRAINING, linewidth=2.0, label=name)
    dotted = {"linestyle": (0, (1, 2)), "marker": "o", "markersize": 6, "markeredgecolor": "white", "zorder": 3}
    for color, (which, curve) in zip(cycle(_VALIDATION), valid.items(), strict=False):
        if curve.values:
            of_set = f" on {which}" if len(valid) > 1 else ""
            name = f"validation loss{of_set}, {curve.values[-1]:.3f} at the end"
            _line(axes, curve, color=color, linewidth=1.0, label=name, **dotted)
    if baseline is not None:
        name = f"{baseline_name or 'baseline'}, {baseline:.3f}"
        axes.axhline(baseline, color=_BASELINE, linewidth=1.4, linestyle=(0, (5, 3)), label=name)
    axes.legend(loc="upper right", fontsize=10.5, labelcolor=_INK, facecolor="white", edgecolor="none", framealpha=0.9)


def _draw_norm_and_rate(axes: "Axes", norm: Curve, rate: Curve) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    plain = StrMethodFormatter("{x:g}")
    _style(axes, _NORM)
    axes.set_ylabel("gradient norm", color=_NORM)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())
    _line(axes, norm, color=_NORM, linewidth=0.9, alpha=0.75)
    right = axes.twinx()
    _style(right, _RATE)
    right.grid(visible=False)
    right.set_ylabel("learning rate", color=_RATE)
    right.yaxis.set_major_formatter(plain)
    _line(right, rate, color=_RATE, linewidth=2.0)
    right.set_ylim(bottom=0)


def _line(axes: "Axes", curve: Curve, **look: Any) -> None:
    if len(curve.values) == 1:
        look.setdefault("marker", "o")
    axes.plot(curve.positions, curve.values, **look)


def _style(axes: "Axes", ink: str = _INK) -> None:
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.tick_params(which="both", length=0, labelsize=10)
    axes.tick_params(axis="y", labelcolor=ink)


def _finish_axis(axes: "Axes", name: str, end: float) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlim(0, end * 1.012)
    axes.set_xlabel(name, color=_INK)
    if name == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def length_histogram_plot(
    bins: Sequence[tuple[int, int]], documents: Sequence[int], tokens: Sequence[int], output: Path, *, title: str
) -> None:
    """Plot a histogram of document lengths, with each bin's share of the documents and of the tokens, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    first = next((position for position, count in enumerate(documents) if count), 0)
    names = [f"{low:,}" if low == high else f"{low:,}\N{EN DASH}{high:,}" for low, high in bins][first:]
    figure = Figure(figsize=(10.0, 5.2), layout="constrained")
    figure.suptitle(f"Document lengths of {title}", x=0.015, ha="left", fontsize=14, fontweight="bold", color=_INK)
    axes = figure.subplots()
    _style(axes)
    positions = range(len(names))
    for shift, values, color, name in ((-0.2, documents, _TRAINING, "documents"), (0.2, tokens, _RATE, "tokens")):
        total = max(1, sum(values))
        shares = [value / total for value in values[first:]]
        axes.bar([position + shift for position in positions], shares, 0.38, color=color, label=f"{total:,} {name}")
    axes.set_xticks(list(positions), names, rotation=35, ha="right")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("tokens per document", color=_INK)
    axes.set_ylabel("share", color=_INK)
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper right", fontsize=10.5, labelcolor=_INK, facecolor="white", edgecolor="none", framealpha=0.9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="png", dpi=160)
