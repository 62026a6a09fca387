"""What a run will keep, counted before it starts."""

import shutil
from pathlib import Path

import pytest

from megalite.checkpoint import forecast
from megalite.checkpoint.manifest import Manifest
from megalite.config import RunConfig, load_run_config


def configured(run_file: Path, *overrides: str) -> RunConfig:
    return load_run_config(run_file, overrides).resolve(world_size=1, vocab_size=None)


@pytest.mark.parametrize(
    ("overrides", "steps", "at_once"),
    [
        ([], (10,), 1),
        (["checkpoint.every=4"], (4, 8, 10), 3),
        (["checkpoint.every=4", "train.stop_after=6"], (4, 6), 2),
        (["checkpoint.every=5"], (5, 10), 2),
        (["checkpoint.every=1", "checkpoint.keep_last=2"], tuple(range(1, 11)), 3),
        (["checkpoint.every=4", "checkpoint.last=false"], (4, 8), 2),
        (["checkpoint.last=false"], (), 0),
    ],
)
def test_what_is_saved_and_how_many_are_there_at_a_time(
    run_file: Path, overrides: list[str], steps: tuple[int, ...], at_once: int
) -> None:
    config = configured(run_file, *overrides)
    expected = forecast.forecast(config, 100, free=1000)
    assert (expected.steps, expected.peak_count, expected.peak_bytes) == (steps, at_once, 100 * at_once)
    assert expected.steps == tuple(
        step for step in range(1, config.train.last_step + 1) if config.checkpoint.due(step, config.train.last_step)
    )


def test_a_disk_that_is_too_small_is_told_of_before_the_first_step(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(run_file.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=250))
    config = configured(run_file, "checkpoint.every=4")
    (told,) = forecast.warnings(config, 100)
    assert told.startswith("warning: checkpoints: ")
    numbers, _, fix = told.partition("; ")
    assert all(number in numbers for number in ("4 steps", "100 B", "3 at most", "300 B", "250 B free"))
    assert "checkpoint.keep_last" in fix
    assert "run.dir" in fix
    assert forecast.warnings(configured(run_file), 100) == []
    (told,) = forecast.warnings(configured(run_file, "checkpoint.last=false"), 100)
    assert told.startswith("checkpoints: none, the run leaves no model")

    # The room of those from before is taken already; of a run that begins anew they are set aside, and stay.
    there = config.run.dir / "checkpoints/step_4"
    there.mkdir(parents=True)
    (there / "manifest.json").write_text(Manifest(4, {}, {}).to_json())
    assert forecast.warnings(config, 100) == []
    assert len(forecast.warnings(configured(run_file, "checkpoint.every=4", "resume=never"), 100)) == 1
