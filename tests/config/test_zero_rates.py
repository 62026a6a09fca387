"""Steps that train with a learning rate of 0 under a scheduler of DeepSpeed's are told, and are those that it has."""

import importlib
from typing import Any

import pytest
import torch

from megalite.config.deepspeed import zero_rates
from megalite.config.deepspeed.defaults import with_defaults
from megalite.config.deepspeed.settings import DeepSpeedSettings

RATE = 1e-3

SCHEDULERS: list[tuple[str, dict[str, Any], list[int]]] = [
    ("WarmupLR", {"warmup_num_steps": 1}, [1, 2]),
    ("WarmupLR", {"warmup_num_steps": 5, "warmup_type": "linear"}, [1, 2]),
    ("WarmupLR", {"warmup_num_steps": 5, "warmup_min_lr": 1e-5}, []),
    ("WarmupDecayLR", {"warmup_num_steps": 1, "total_num_steps": 12}, [1, 2]),
    ("WarmupDecayLR", {"warmup_num_steps": 3, "total_num_steps": 8}, [1, 2, 10, 11, 12]),
    ("WarmupDecayLR", {"warmup_num_steps": 5, "total_num_steps": 2}, [1, 2, *range(7, 13)]),
    ("WarmupDecayLR", {"warmup_num_steps": 1, "total_num_steps": 1}, [1, 2, *range(4, 13)]),
    ("WarmupDecayLR", {"warmup_num_steps": 3, "total_num_steps": 8, "warmup_min_lr": 1e-4}, []),
    ("WarmupCosineLR", {"warmup_num_steps": 3, "total_num_steps": 12}, [1, 2]),
    ("WarmupCosineLR", {"warmup_num_steps": 3, "total_num_steps": 12, "warmup_min_ratio": 0.1}, [1]),
    ("OneCycle", {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 20}, [1]),
    (
        "OneCycle",
        {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 20, "cycle_first_stair_count": 7},
        [1, 2, 3],
    ),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 20}, []),
    ("LRRangeTest", {"lr_range_test_min_lr": 0.1}, []),
]


def note(kind: str, params: dict[str, Any], steps: int = 12) -> str | None:
    stated = DeepSpeedSettings.parse({"scheduler": {"type": kind, "params": params}})
    scheduler = with_defaults(stated, lr=RATE).scheduler
    assert scheduler is not None
    told = zero_rates.zero_rate_note(scheduler, steps)
    return None if told is None else told.text


def idle_steps(kind: str, params: dict[str, Any]) -> list[int]:
    """The steps of twelve that DeepSpeed's own scheduler trains with a rate of 0."""
    schedules = importlib.import_module("deepspeed.runtime.lr_schedules")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler = getattr(schedules, kind)(optimizer, **params)
    idle = []
    for step in range(1, 13):
        if optimizer.param_groups[0]["lr"] == 0:
            idle.append(step)
        scheduler.step()
    return idle


@pytest.mark.parametrize(("kind", "params", "idle"), SCHEDULERS)
def test_the_steps_that_are_told_are_those_of_deepspeed(kind: str, params: dict[str, Any], idle: list[int]) -> None:
    assert idle_steps(kind, params) == idle
    told = note(kind, params)
    if not idle:
        assert told is None
        return
    assert told is not None
    first = [step for place, step in enumerate(idle, start=1) if step == place]
    late = idle[len(first) :]
    for span in filter(None, (first, late)):
        assert (f"steps {span[0]} to {span[-1]}" if len(span) > 1 else f"step {span[0]}") in told
    assert "delete" in told


def test_a_run_of_one_step_is_told_of_that_step() -> None:
    told = note("WarmupLR", {"warmup_num_steps": 1}, steps=1)
    assert told is not None
    assert "in step 1," in told
    assert "scheduler.params.warmup_min_lr" in told
