from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from megalite.parallel.placement import Placement
from megalite.pipeline.instructions import Forward, parse
from megalite.pipeline.schedules import all_streams, forward_only, interleaved_1f1b, one_f_one_b, zb_v
from megalite.pipeline.timeline.plot import plot_timelines, timeline_figure
from megalite.pipeline.timeline.simulator import Cost, simulate
from megalite.pipeline.timeline.spans import Span, Timeline

pytestmark = pytest.mark.slow


def simulated(num_stages: int = 4, num_microbatches: int = 16) -> Timeline:
    return simulate(all_streams(one_f_one_b, Placement(num_stages), num_microbatches))


def measured(num_stages: int = 4, num_microbatches: int = 16) -> Timeline:
    cost = Cost(forward=0.010, backward=0.021, send=0.003, unit="seconds")
    timeline = simulate(all_streams(one_f_one_b, Placement(num_stages), num_microbatches), cost, rendezvous=True)
    waits = tuple(Span(span.rank, parse("0SA0"), span.end, span.end + 0.003) for span in timeline.spans)
    return Timeline(timeline.spans + waits)


def in_a_v() -> Timeline:
    return simulate(all_streams(zb_v, Placement(4, 2, "v"), 8))


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
    for timeline in (measured(), simulated(), in_a_v()):
        axes = timeline_figure({"it": timeline}, "").axes[0]
        scale = 1000.0 if timeline.unit == "seconds" else 1.0
        expected = [
            ((span.start - timeline.start) * scale, (span.end - span.start) * scale, span.rank)
            for span in timeline.compute
        ]
        assert len(boxes(axes)) == len(timeline.compute)
        for box, span in zip(boxes(axes), sorted(expected), strict=True):
            assert box == pytest.approx(span)
        numbers = sorted(text.get_text() for text in axes.texts)
        assert numbers == sorted(str(span.instruction.microbatch) for span in timeline.compute)


@pytest.mark.parametrize("timeline", [measured(), simulated(2, 8), simulated(8, 64), in_a_v()])
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
    assert legend(timeline_figure({"it": simulate(all_streams(forward_only, Placement(2), 3))}, "")) == ["forward"]


def test_the_stages_of_a_rank_are_told_apart() -> None:
    figure = timeline_figure({"it": in_a_v()}, "")
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == [f"rank {rank}: stages {rank}, {7 - rank}" for rank in range(4)]
    kinds = ["forward", "backward", "backward, input", "backward, weights"]
    assert legend(figure) == [*kinds, "1st stage of a rank", "2nd stage of a rank"]
    colours = {to_hex(collection.get_facecolor()[0]) for collection in figure.axes[0].collections}  # pyright: ignore
    assert len(colours) == 2 * len(kinds)
    four = timeline_figure({"it": simulate(all_streams(interleaved_1f1b, Placement(2, 4), 2))}, "")
    assert legend(four)[2:] == [f"{way} stage of a rank" for way in ("1st", "2nd", "3rd", "4th")]


@pytest.mark.parametrize("timeline", [measured(), in_a_v()])
def test_the_title_has_room_beside_the_legend(timeline: Timeline) -> None:
    figure = timeline_figure({"it": timeline}, "Interleaved 1F1B on 4 ranks, step 100")
    figure.draw_without_rendering()
    title = figure._suptitle  # pyright: ignore
    assert not figure.legends[0].get_window_extent().overlaps(title.get_window_extent())


def test_numbers_can_be_read_on_every_colour() -> None:
    """The contrast ratio that WCAG 2 asks of large text, 3 to 1."""
    axes = timeline_figure({"it": in_a_v()}, "").axes[0]
    box_at = {
        (round(float(box.x0 + box.width / 2), 6), round(float(box.y0 + box.y1) / 2)): collection.get_facecolor()[0]
        for collection in axes.collections
        for box in (path.get_extents() for path in collection.get_paths())
    }
    for text in axes.texts:
        at, row = text.get_position()
        light = sorted(luminance(colour) for colour in (box_at[round(at, 6), round(row)], to_rgb(text.get_color())))
        assert (light[1] + 0.05) / (light[0] + 0.05) >= 3


def luminance(colour) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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
