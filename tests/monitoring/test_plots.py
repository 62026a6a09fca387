import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.errors import UserError
from megalite.monitoring.plots import loss_curve, loss_figure

pytestmark = pytest.mark.slow


def run(steps: Iterable[int], **extra: Any) -> list[dict[str, Any]]:
    """Training lines, with an evaluation after every tenth step; losses tell their step."""
    lines = []
    for step in steps:
        line = {"step": step, "loss": 8.0 - step / 100, "learning_rate": 1e-3, "grad_norm": 1.5, "tokens": step * 512}
        lines.append(line | extra)
        lines += [{"step": step, "valid_loss": 8.5 - step / 100}] if step % 10 == 0 else []
    return lines


def write(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    path = folder / "quickstart" / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def drawn(path: Path, **options: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every line of the figure by its label, the two of the lower panel by their axis."""
    upper, lower, right = loss_figure(path, **options).axes
    named = {str(line.get_label()): line for line in upper.lines}
    named |= {axes.get_ylabel(): line for axes in (lower, right) for line in axes.lines}
    return {name: (np.array(line.get_xdata()), np.array(line.get_ydata())) for name, line in named.items()}


def test_a_png_is_written_and_folders_are_made(tmp_path: Path) -> None:
    output = tmp_path / "pictures" / "loss.png"
    loss_curve(write(tmp_path, run(range(1, 41))), output, baseline=6.1, baseline_name="unigram entropy")
    assert output.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_validation_sets_are_drawn_apart(tmp_path: Path) -> None:
    evaluations = [
        {"step": step, "valid_set": name, "valid_loss": loss + step}
        for step in (10, 20)
        for name, loss in (("web", 5.0), ("code", 3.0))
    ]
    lines = drawn(write(tmp_path, [line for line in run(range(1, 21)) if "loss" in line] + evaluations))
    assert lines["validation loss on web, 25.000 at the end"][1].tolist() == [15.0, 25.0]
    assert lines["validation loss on code, 23.000 at the end"][1].tolist() == [13.0, 23.0]


def test_every_quantity_is_drawn_over_tokens(tmp_path: Path) -> None:
    path = write(tmp_path, run(range(1, 101)))
    lines = drawn(path, baseline=6.123, baseline_name="unigram entropy")
    assert sorted(lines) == [
        "gradient norm",
        "learning rate",
        "training loss, each step",
        "training loss, mean over 5 steps",
        "unigram entropy, 6.123",
        "validation loss, 7.500 at the end",
    ]
    tokens = np.arange(1, 101) * 512.0
    raw, smooth, valid = (lines[name] for name in sorted(lines) if "loss" in name)
    np.testing.assert_array_equal(raw, (tokens, 8.0 - np.arange(1, 101) / 100))
    np.testing.assert_allclose(smooth[1][:98], raw[1][:98])
    np.testing.assert_array_equal(valid, (tokens[9::10], 8.5 - np.arange(10, 101, 10) / 100))
    np.testing.assert_array_equal(lines["learning rate"], (tokens, np.full(100, 1e-3)))
    np.testing.assert_array_equal(lines["gradient norm"], (tokens, np.full(100, 1.5)))
    figure = loss_figure(path)
    assert figure.axes[1].get_xlabel() == "tokens"
    assert figure.get_suptitle() == "Training of quickstart"


def test_the_mean_is_over_a_window_around_each_step(tmp_path: Path) -> None:
    losses = np.random.default_rng(0).normal(5.0, 1.0, 100)
    lines = [{"step": index, "loss": loss} for index, loss in enumerate(losses, start=1)]
    _, smooth = drawn(write(tmp_path, lines))["training loss, mean over 5 steps"]
    assert smooth[50] == pytest.approx(losses[48:53].mean())
    assert smooth[0] == pytest.approx(losses[0])
    assert smooth[1] == pytest.approx(losses[0:3].mean())
    assert smooth[99] == pytest.approx(losses[97:].mean())


@pytest.mark.parametrize("tokens", [None, 512])
def test_steps_are_the_axis_where_tokens_do_not_count_up(tmp_path: Path, tokens: int | None) -> None:
    path = write(tmp_path, run(range(1, 11), tokens=tokens))
    positions, _ = drawn(path)["training loss"]
    assert list(positions) == list(range(1, 11))
    assert loss_figure(path).axes[1].get_xlabel() == "step"


def test_an_evaluation_before_the_first_step_is_drawn_at_the_start(tmp_path: Path) -> None:
    lines = [{"step": 0, "valid_loss": 9.0}, *run(range(1, 11))]
    positions, losses = drawn(write(tmp_path, lines))["validation loss, 8.400 at the end"]
    assert (list(positions), list(losses)) == ([0, 5120], [9.0, 8.4])


@pytest.mark.parametrize("tail", ['{"step": 11, "lo', '{"step": 11, "loss": 7.0', "{", "\0\0\0", "[1, 2]", "7"])
def test_a_torn_line_is_left_out(tmp_path: Path, tail: str) -> None:
    lines = run(range(1, 11))
    assert len(drawn(write(tmp_path, lines, tail))["training loss"][0]) == 10
    torn_and_resumed = tail + "\n" + json.dumps(run([11])[0]) + "\n"
    assert len(drawn(write(tmp_path, lines, torn_and_resumed))["training loss"][0]) == 11


def test_a_step_done_again_after_a_resume_counts_once_as_its_later_line_says(tmp_path: Path) -> None:
    again = [line | ({"loss": 1.0} if "loss" in line else {}) for line in run(range(8, 13))]
    positions, losses = drawn(write(tmp_path, run(range(1, 11)) + again))["training loss"]
    assert list(positions) == [512 * step for step in range(1, 13)]
    assert list(losses[7:]) == [1.0] * 5


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_losses_that_are_not_finite_are_left_out(tmp_path: Path, loss: float | None) -> None:
    lines = run(range(1, 10))
    lines[3] |= {"loss": loss, "grad_norm": loss, "skipped": True}
    drawn_lines = drawn(write(tmp_path, lines))
    assert 4 * 512 not in drawn_lines["training loss"][0]
    assert len(drawn_lines["gradient norm"][0]) == 8


def test_one_step_and_nothing_but_a_loss_is_enough(tmp_path: Path) -> None:
    path = write(tmp_path, [{"step": 1, "loss": 9.0}])
    loss_curve(path, tmp_path / "loss.png")
    upper = loss_figure(path).axes[0]
    assert upper.lines[0].get_marker() == "o"


def test_a_baseline_without_a_name_is_called_so(tmp_path: Path) -> None:
    path = write(tmp_path, run(range(1, 5)))
    assert "baseline, 5.000" in drawn(path, baseline=5.0)
    assert not any("baseline" in name for name in drawn(path))


def test_a_missing_file_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read \(No such file"):
        loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


@pytest.mark.parametrize("lines", [[], [{"step": 1, "valid_loss": 3.0}], [{"step": 1, "loss": math.nan}]])
def test_a_file_without_a_loss_is_the_users_to_mend(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="no line has a finite training loss"):
        loss_curve(write(tmp_path, lines), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
