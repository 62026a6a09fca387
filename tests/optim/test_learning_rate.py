"""Learning-rate schedules at the steps where they turn."""

import pytest

from megalite.config import ScheduleSection
from megalite.optim.learning_rate import learning_rate

PEAK = 1.0


def rates(total: int, **fields: object) -> list[float]:
    schedule = ScheduleSection.model_validate(fields)
    return [learning_rate(step, total, schedule, PEAK) for step in range(1, total + 1)]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(name: str) -> None:
    tail = {"decay_steps": 4} if name == "wsd" else {}
    assert rates(20, name=name, warmup_steps=4, **tail)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_minimum() -> None:
    found = rates(24, name="cosine", warmup_steps=4, min_lr=0.1)
    assert found[13] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1)
    assert found[4:] == sorted(found[4:], reverse=True)


def test_linear_falls_evenly() -> None:
    assert rates(4, name="linear", min_lr=0.2) == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_constant_stays() -> None:
    assert rates(5, name="constant") == [1.0] * 5


def test_wsd_stays_and_then_falls() -> None:
    assert rates(8, name="wsd", decay_steps=4, min_lr=0.2) == pytest.approx([1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_every_step_trains_also_the_only_one_of_a_run(name: str, warmup: int) -> None:
    for total in (1, 2, 3, 10):
        tail = {"decay_steps": max(1, total - warmup)} if name == "wsd" else {}
        found = rates(total, name=name, warmup_steps=warmup, **tail)
        assert min(found) >= 0.1 - 1e-12
        assert max(found) <= 1.0


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_stated_minimum_is_where_a_run_ends(name: str) -> None:
    for low in (0.0, 1e-5, 0.3):
        assert rates(7, name=name, min_lr=low)[-1] == pytest.approx(low, rel=1e-9)
    assert rates(7, name=name)[-1] == pytest.approx(0.1, rel=1e-9)
