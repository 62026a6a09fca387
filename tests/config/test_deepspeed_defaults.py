"""What acts unasked is written out, and is what DeepSpeed itself takes."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.config import load_run_config
from megalite.config.deepspeed.defaults import LOSS_SCALING, SCHEDULERS, with_defaults
from megalite.config.deepspeed.settings import DeepSpeedSettings
from megalite.config.deepspeed.table import REQUIRED_BY_SCHEDULER
from megalite.config.deepspeed.table import SCHEDULERS as KNOWN

BARE = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "fp32"}}
STAGE_1 = {"zero_optimization": {"stage": 1}}


def test_the_defaults_are_those_of_deepspeed() -> None:
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    fields = DeepSpeedFP16Config.model_fields
    assert {name: fields[name].default for name in LOSS_SCALING} == LOSS_SCALING
    assert set(SCHEDULERS) == set(KNOWN)
    for name, ours in SCHEDULERS.items():
        theirs = inspect.signature(getattr(lr_schedules, name)).parameters
        assert {key: theirs[key].default for key in ours} == ours
        silent = {key for key, value in theirs.items() if value.default not in (None, inspect.Parameter.empty, -1)}
        assert silent == set(ours) - set(REQUIRED_BY_SCHEDULER.get(name, ()))
    config = DeepSpeedConfig({"train_batch_size": 1})
    assert (config.gradient_clipping, config.zero_config.stage) == (1.0, 0)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, BARE),
        ({"gradient_clipping": 0.5, **STAGE_1}, BARE | {"gradient_clipping": 0.5, **STAGE_1}),
        ({"gradient_clipping": 0.0}, BARE | {"gradient_clipping": 0.0}),
        (
            {"fp16": {"enabled": True, "hysteresis": 3}, **STAGE_1},
            BARE | {"fp16": {**LOSS_SCALING, "enabled": True, "hysteresis": 3}, **STAGE_1},
        ),
        (
            {"fp16": {"enabled": True, "loss_scale": 128}, **STAGE_1},
            BARE | {"fp16": {"enabled": True, "loss_scale": 128}, **STAGE_1},
        ),
        ({"fp16": {"enabled": False}}, BARE | {"fp16": {"enabled": False}}),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
            BARE
            | {
                "scheduler": {
                    "type": "WarmupLR",
                    "params": {
                        "warmup_min_lr": 0.0,
                        "warmup_max_lr": 0.25,
                        "warmup_num_steps": 5,
                        "warmup_type": "log",
                    },
                }
            },
        ),
    ],
)
def test_what_acts_unasked_is_written_out(document: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = with_defaults(DeepSpeedSettings.parse(document), lr=0.25)
    assert settings.document == expected
    assert with_defaults(settings, lr=0.25) == settings
    assert DeepSpeedSettings.parse(settings.document) == settings, "the reader takes what was written"


def test_the_resolved_run_file_states_clipping_and_the_rate(run_file: Path) -> None:
    given = ["deepspeed={}", "train.optimizer=null", "train.schedule=null"]
    config = load_run_config(run_file, given).resolve(world_size=1, vocab_size=None)
    document = yaml.safe_load(config.to_yaml())
    assert document["deepspeed"] == BARE
    assert document["train"]["optimizer"] == {
        "name": "adamw",
        "lr": 0.0003,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "groups": [],
    }
    assert document["train"]["schedule"] == {"name": "cosine", "warmup_steps": 0, "min_lr": 3e-5}
    assert document["checkpoint"] == {"every": 0, "last": True, "async": False, "on_error": "stop"}
