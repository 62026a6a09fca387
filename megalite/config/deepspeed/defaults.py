"""What DeepSpeed takes for settings that a JSON leaves out, where they change the result of a run.

The resolved run file states them, so that what acts can be read. Sizes of buckets and the like, which change speed and
memory alone, stay DeepSpeed's own.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalite.config.deepspeed.settings import DeepSpeedSettings

LOSS_SCALING: Mapping[str, Any] = {
    "loss_scale": 0.0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
}
"""Of fp16; a `loss_scale` of 0 is one that follows the gradients, and the others are of that alone."""

_WARMUP: Mapping[str, Any] = {"warmup_num_steps": 1000, "warmup_type": "log"}
SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "WarmupLR": {"warmup_min_lr": 0.0, **_WARMUP},
    # Its peak is not the optimizer's rate, unlike that of WarmupLR.
    "WarmupDecayLR": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.001, **_WARMUP},
    "WarmupCosineLR": {"warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001, **_WARMUP},
    "OneCycle": {
        "decay_lr_rate": 0.0,
        "cycle_first_step_size": 2000,
        "cycle_first_stair_count": 0,
        "decay_step_size": 0,
        "cycle_momentum": True,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0.0,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": 1e-3,
        "lr_range_test_step_size": 2000,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_staircase": False,
    },
}


def with_defaults(settings: DeepSpeedSettings, *, lr: float) -> DeepSpeedSettings:
    """Return the settings with what acts unasked written out; `lr` is the optimizer's, at which WarmupLR ends."""
    document = copy.deepcopy(dict(settings.document))
    document.setdefault("zero_optimization", {}).setdefault("stage", settings.zero_stage)
    document.setdefault("gradient_clipping", settings.gradient_clipping)
    document.setdefault("data_types", {}).setdefault("grad_accum_dtype", settings.gradient_precision)
    if settings.precision == "fp16":
        fixed = document["fp16"].get("loss_scale", 0) > 0
        document["fp16"] = {**({} if fixed else LOSS_SCALING), **document["fp16"]}
    if scheduler := document.get("scheduler"):
        defaults = dict(SCHEDULERS[scheduler["type"]])
        if scheduler["type"] == "WarmupLR":
            defaults["warmup_max_lr"] = lr
        scheduler["params"] = {**defaults, **scheduler.get("params", {})}
    return replace(settings, document=document)
