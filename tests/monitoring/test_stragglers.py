"""Stragglers: a rank's own time has no waits for others, and the ranks beyond their peers are named."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import TINY
from harness import run_distributed

from megalite.monitoring.stragglers import WINDOW, StragglerDetector
from megalite.parallel.layout import ParallelLayout
from megalite.pipeline.compute_timer import ThreadTimer


def burn(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_ranks_own_time_is_that_of_its_work() -> None:
    own = ThreadTimer()
    with own.measured():
        time.sleep(0.3)
    slept = own.take()
    with own.measured():
        burn(0.2)
    burn(0.2)
    assert slept < 0.1
    assert own.take() > 0.19
    assert own.take() == 0.0


def judged(layout: ParallelLayout, seconds: Sequence[float], factor: float = 1.5) -> list[tuple[int, float]]:
    """The ranks that a window of equal steps names, and their factors."""
    watch = StragglerDetector(layout, factor)
    found = [watch.update(seconds) for _ in range(WINDOW)]
    assert not any(found[:-1]), "named before the window was over"
    assert not any(watch.update(seconds) for _ in range(WINDOW - 1)), "the next window begins anew"
    return [(one.rank, round(one.factor, 3)) for one in found[-1]]


@pytest.mark.parametrize(
    ("layout", "seconds", "named"),
    [
        pytest.param(ParallelLayout(1, 1, 4), [1.0, 1.1, 0.9, 1.4], [], id="none beyond the factor"),
        pytest.param(ParallelLayout(1, 1, 4), [1.0, 1.0, 2.0, 1.0], [(2, 2.0)], id="one of four"),
        pytest.param(ParallelLayout(1, 1, 2), [2.0, 1.0], [(0, 2.0)], id="one of two"),
        pytest.param(ParallelLayout(1, 2, 1), [1.0, 3.0], [], id="a stage has its own work"),
        pytest.param(ParallelLayout(2, 2, 1), [1.0, 1.0, 3.0, 6.0], [(3, 2.0)], id="judged among its stage"),
        pytest.param(ParallelLayout(1, 1, 2), [0.0, 0.0], [], id="nothing was measured"),
    ],
)
def test_a_rank_beyond_its_peers_is_named(
    layout: ParallelLayout, seconds: Sequence[float], named: list[tuple[int, float]]
) -> None:
    assert judged(layout, seconds) == named


def test_a_single_slow_step_names_nobody() -> None:
    watch = StragglerDetector(ParallelLayout(1, 1, 2), 1.5)
    assert watch.update([5.0, 1.0]) == []
    assert [watch.update([1.0, 1.0]) for _ in range(WINDOW - 1)] == [[]] * (WINDOW - 1)


def train_beside_a_straggler(path: str, overrides: Sequence[str], slow: int) -> None:
    from training import build_trainer

    trainer = build_trainer(path, overrides)
    if trainer.mesh.rank == slow:
        stage = next(iter(trainer.engine.stages.values()))
        stage.register_forward_pre_hook(lambda module, inputs: burn(0.05))
    trainer.run()
    trainer.close()


def test_a_slow_rank_is_named_in_the_runs_metrics(run_file: Path, tmp_path: Path) -> None:
    overrides = [*TINY, "parallel.data=2", "train.global_batch_size=2", f"train.steps={WINDOW}"]
    run_distributed(train_beside_a_straggler, 2, str(run_file), overrides, 1)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (named,) = [record for record in records if "straggler" in record]
    assert (named["step"], named["straggler"]) == (WINDOW, 1)
    assert named["own_seconds"] > 1.5 * named["median_own_seconds"] > 0
