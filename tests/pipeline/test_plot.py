from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure

from megalite.pipeline.instructions import Forward, parse
from megalite.pipeline.plot import plot_timelines, timeline_figure
from megalite.pipeline.schedule import all_streams, forward_only, one_f_one_b
from megalite.pipeline.simulate import Cost, simulate
from megalite.pipeline.timeline import Span, Timeline


def simulated(num_stages: int = 4, num_microbatches: int = 16) -> Timeline:
    return simulate(all_streams(one_f_one_b, num_stages, num_microbatches))


def measured(num_stages: int = 4, num_microbatches: int = 16) -> Timeline:
    cost = Cost(forward=0.010, backward=0.021, send=0.003, unit="seconds")
    timeline = simulate(all_streams(one_f_one_b, num_stages, num_microbatches), cost, rendezvous=True)
    waits = tuple(Span(span.rank, parse("0SA0"), span.end, span.end + 0.003) for span in timeline.spans)
    return Timeline(timeline.spans + waits)


def boxes(axes: Axes) -> list[tuple[float, float, float]]:
    """The left edge, width and row of every box."""
    found = []
    for collection in axes.collections:
        assert isinstance(collection, PatchCollection)
        for path in collection.get_paths():
            box = path.get_extents()
            found.append((float(box.x0), float(box.width), float(box.y0 + box.y1) / 2))
    return sorted(found)


def title(axes: Axes, where: str) -> str:
    return axes.get_title(loc=where)  # pyright: ignore[reportArgumentType]


def test_a_png_is_written_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "timeline.png"
    plot_timelines({"measured": measured(), "simulated": simulated()}, path, "1F1B")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_every_compute_has_a_box_and_its_number_and_nothing_else_has() -> None:
    for timeline in (measured(), simulated()):
        axes = timeline_figure({"it": timeline}, "").axes[0]
        scale = 1000.0 if timeline.unit == "seconds" else 1.0
        expected = [
            ((span.start - timeline.start) * scale, (span.end - span.start) * scale, span.rank)
            for span in timeline.compute
        ]
        assert len(boxes(axes)) == 4 * 2 * 16
        for box, span in zip(boxes(axes), sorted(expected), strict=True):
            assert box == pytest.approx(span)
        numbers = sorted(text.get_text() for text in axes.texts)
        assert numbers == sorted(str(span.instruction.microbatch) for span in timeline.compute)


@pytest.mark.parametrize("timeline", [measured(), simulated(2, 8), simulated(8, 64)])
def test_numbers_stay_inside_their_boxes(timeline: Timeline) -> None:
    figure = timeline_figure({"it": timeline}, "")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    widths = {(round(left + width / 2, 6), round(row)): width for left, width, row in boxes(axes)}
    assert len(axes.texts) > len(timeline.compute) / 4
    for text in axes.texts:
        at, row = text.get_position()
        extent = text.get_window_extent().transformed(axes.transData.inverted())
        assert extent.width <= widths[round(at, 6), round(row)]


def test_numbers_that_nobody_could_read_are_left_out() -> None:
    assert not timeline_figure({"it": simulated(8, 256)}, "").axes[0].texts


def test_labels_say_what_is_drawn() -> None:
    timeline = simulated()
    figure = timeline_figure({"measured": measured(), "simulated": timeline}, "1F1B, 4 stages")
    upper, lower = figure.axes
    assert figure.get_suptitle() == "1F1B, 4 stages"
    assert (title(upper, "left"), title(lower, "left")) == ("measured", "simulated")
    assert title(lower, "right") == "bubble 15.8%, 57 forwards in all"
    assert f"{measured().bubble_fraction:.1%}" in title(upper, "right")
    assert title(upper, "right").endswith("ms in all")
    assert (upper.get_xlabel(), lower.get_xlabel()) == ("time, ms", "time, in forwards of one microbatch")
    assert [label.get_text() for label in upper.get_yticklabels()] == ["stage 0", "stage 1", "stage 2", "stage 3"]
    assert legend(figure) == ["forward", "backward"]


def test_an_evaluation_has_no_backward_in_its_legend() -> None:
    assert legend(timeline_figure({"it": simulate(all_streams(forward_only, 2, 3))}, "")) == ["forward"]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_panels_of_one_unit_share_their_axis() -> None:
    short, long, other = simulated(2, 4), simulated(2, 8), measured(2, 4)
    limits = [axes.get_xlim()[1] for axes in timeline_figure({"a": short, "b": long, "c": other}, "").axes]
    assert limits == pytest.approx([long.makespan, long.makespan, other.makespan * 1000])


def test_a_clock_that_starts_anywhere_is_drawn_from_zero() -> None:
    timeline = Timeline((Span(0, Forward(0, 0), 5000.0, 5000.5), Span(0, Forward(0, 1), 5001.0, 5001.5)))
    assert boxes(timeline_figure({"it": timeline}, "").axes[0]) == [(0.0, 500.0, 0.0), (1000.0, 500.0, 0.0)]


@pytest.mark.parametrize("timelines", [{}, {"it": Timeline(())}, {"it": Timeline((Span(0, Forward(0, 0), 1.0, 1.0),))}])
def test_nothing_to_draw_is_refused(timelines: dict[str, Timeline], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_timelines(timelines, tmp_path / "timeline.png", "")
    assert not list(tmp_path.iterdir())
