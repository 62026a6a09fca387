"""DeepSpeed's JSON: the table against DeepSpeed itself, and the exact words for everything that is refused."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from known_deepspeed_jsons import KNOWN

from megalite.config import RunConfig, load_run_config
from megalite.config.deepspeed.adamw import DEEPSPEED_ADAMW, AdamW
from megalite.config.deepspeed.parse import read_document, read_json
from megalite.config.deepspeed.rules import Honoured, Off
from megalite.config.deepspeed.settings import DeepSpeedSettings
from megalite.config.deepspeed.table import (
    ADAM_PARAMS,
    BF16,
    FP16,
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAM,
    REQUIRED_BY_SCHEDULER,
    SCHEDULERS,
    TABLE,
    ZERO,
)
from megalite.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
BF16_ON = {"bf16": {"enabled": True}}


def parse(data: dict[str, Any]) -> DeepSpeedSettings:
    return DeepSpeedSettings.parse(data)


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


# --------------------------------------------------------------------------------------------------- what is honoured


def test_what_is_honoured_reaches_the_engine_and_the_optimizer_does_not() -> None:
    data = {
        **zero(2, reduce_bucket_size=5e8, overlap_comm=True),
        **BF16_ON,
        "gradient_clipping": 0.5,
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "communication_data_type": "fp32",
        "steps_per_print": 10,
        "pipeline": {"stages": 2},
        "vocabulary_size": 100,
    }
    assert parse(data).engine_config(4, 8) == {
        **zero(2, reduce_bucket_size=500_000_000, overlap_comm=True),
        **BF16_ON,
        "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "communication_data_type": "fp32",
        "steps_per_print": 10,
    }


def test_an_empty_json_is_fp32_at_stage_0_with_deepspeeds_clipping() -> None:
    settings = parse({})
    assert (settings.precision, settings.zero_stage, settings.gradient_clipping) == ("fp32", 0, 1.0)
    assert settings.optimizer is None
    assert settings.scheduler is None
    assert settings.engine_config(1, 2)["gradient_clipping"] == 1.0


def test_the_engines_json_is_the_callers_own() -> None:
    settings = parse(zero(1))
    settings.engine_config(1, 1)["zero_optimization"]["stage"] = 3
    assert settings.zero_stage == 1


@pytest.mark.parametrize(
    ("data", "precision"),
    [
        (BF16_ON, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "fp16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": "auto"}}, "fp16"),
        ({"fp16": {"loss_scale": 0}}, "fp32"),
    ],
)
def test_precision(data: dict[str, Any], precision: str) -> None:
    assert parse(data).precision == precision


def test_the_optimizers_parameters_default_as_deepspeeds_do_and_auto_as_ours() -> None:
    settings = parse({"optimizer": {"type": "Adam", "params": {"adam_w_mode": True, "betas": "auto", "eps": 1e-6}}})
    assert settings.optimizer == AdamW(lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)


HUGGING_FACE: dict[str, Any] = {
    "fp16": {"enabled": False, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": True},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": False},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": 100,
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "tensorboard": {"enabled": False},
    "flops_profiler": {"enabled": False, "top_modules": 1},
}


def test_every_auto_of_a_hugging_face_json_is_resolved() -> None:
    settings = parse(HUGGING_FACE).resolve_auto(hidden_size=64, steps=1000, lr=0.25)
    config = settings.engine_config(2, 4)
    assert "auto" not in json.dumps(config)
    assert config["zero_optimization"]["reduce_bucket_size"] == 4096
    assert config["zero_optimization"]["stage3_prefetch_bucket_size"] == 3686
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 640
    assert "offload_optimizer" not in config["zero_optimization"]
    assert config["scheduler"]["params"] == {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 0.25,
        "warmup_num_steps": 100,
        "total_num_steps": 1000,
    }
    assert config["gradient_clipping"] == 1.0
    assert settings.optimizer == AdamW()
    assert config.keys() == {
        *("fp16", "bf16", "scheduler", "zero_optimization", "gradient_clipping", "wall_clock_breakdown"),
        *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    }


@pytest.mark.parametrize(
    ("data", "precision"),
    [
        ({}, "fp32"),
        (BF16_ON, "fp32"),
        ({"data_types": {"grad_accum_dtype": "auto"}, **BF16_ON}, "fp32"),
        ({"data_types": {"grad_accum_dtype": "fp32"}, **BF16_ON}, "fp32"),
        ({"data_types": {"grad_accum_dtype": "bf16"}, **BF16_ON}, "bf16"),
        ({"data_types": {"grad_accum_dtype": "fp16"}, "fp16": {"enabled": True}}, "fp16"),
    ],
)
def test_gradients_are_added_up_in_fp32_unless_told_otherwise(data: dict[str, Any], precision: str) -> None:
    assert parse(data).gradient_precision == precision


def test_a_document_reads_back_as_itself() -> None:
    document, faults, notes = read_document(HUGGING_FACE)
    assert (faults, notes) == ([], [])
    assert read_document(document) == (document, [], [])


@pytest.mark.parametrize(
    "data",
    [
        {"amp": None},
        {"data_types": {"grad_accum_dtype": None}},
        {"data_types": {"grad_accum_dtype": "auto"}},
        {"tensor_parallel": {"autotp_size": 1}, "compile": {"deepcompile": False}, "autotuning": {}},
        {"checkpoint": {"tag_validation": "Warn", "load_universal": False}},
        {"gradient_allreduce_op": "mean", "dataloader_drop_last": False},
        {"wandb": {"enabled": False, "project": "x"}, "bf16": {"bf16_optimizer_states": False}},
        {"zero_optimization": {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zenflow": None}},
        {"pipeline": {"stages": "auto", "partition": "best", "activation_checkpoint_interval": 0}},
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": 0, "profile": False}},
    ],
)
def test_what_asks_for_nothing_is_left_out(data: dict[str, Any]) -> None:
    assert parse(data).document == {}


# --------------------------------------------------------------------------------- JSONs that many people have, as is

RUN: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {
        "architecture": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
    },
    "data": {"sequence_length": 64, "train": [{"prefix": "data/corpus"}]},
    "train": {
        "steps": 100,
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "optimizer": {"lr": 1e-4, "betas": [0.9, 0.98]},
    },
}


def load(tmp_path: Path, document: Any, *overrides: str, run: dict[str, Any] = RUN) -> RunConfig:
    """Load a run file whose JSON is a file beside it; no JSON where the document is None."""
    content = run
    if document is not None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(document))
        content = run | {"deepspeed": str(path)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return load_run_config(tmp_path / "run.yaml", overrides).resolve(world_size=None, vocab_size=None)


@pytest.mark.parametrize("name", KNOWN)
def test_a_json_that_many_people_have_is_taken_as_it_is(deepspeed: Any, tmp_path: Path, name: str) -> None:
    """Beside a run file that has an optimizer, with and without a warm-up, in each precision that the JSON allows."""
    from deepspeed.runtime.config import DeepSpeedConfig

    document = KNOWN[name]
    switches = [document.get(key, {}).get("enabled") for key in ("bf16", "fp16")]
    allowed = ["bf16", "fp16", "fp32"] if "auto" in switches else []
    for asked in (None, *allowed):
        given = [] if asked is None else [f"train.precision={asked}"]
        config = load(tmp_path, document, *given)
        assert config.precision == config.train.precision == (asked or ("fp16" if switches[1] is True else "bf16"))
        stage = document["zero_optimization"]["stage"]
        assert config.zero_stage == (max(1, stage) if config.precision != "fp32" else stage)
        assert (config.optimizer.lr, config.optimizer.betas) == (1e-4, (0.9, 0.98))
        engine = config.deepspeed.engine_config(4, 1)
        assert "auto" not in json.dumps(engine)
        theirs = DeepSpeedConfig({**engine, "train_batch_size": 4})
        assert theirs.zero_optimization_stage == config.zero_stage
        assert theirs.bfloat16_config.enabled == (config.precision == "bf16")
        assert theirs.float16_config.enabled == (config.precision == "fp16")
        again = tmp_path / "again.yaml"
        again.write_text(config.to_yaml())
        loaded = load_run_config(again)
        assert loaded.resolve(world_size=None, vocab_size=None) == config
        assert loaded.deepspeed.notes == ()
    if "scheduler" in document:
        config = load(tmp_path, document, "train.schedule.warmup_steps=7")
        scheduler = config.deepspeed.scheduler
        assert scheduler is not None
        assert scheduler["params"] == {
            "warmup_min_lr": 0.0,
            "warmup_max_lr": 1e-4,
            "warmup_num_steps": 7,
            "warmup_type": "log",
            **({"total_num_steps": 100} if "total_num_steps" in document["scheduler"]["params"] else {}),
        }
        assert config.train.schedule is None


AUTO, ON, OFF = {"enabled": "auto"}, {"enabled": True}, {"enabled": False}


@pytest.mark.parametrize(
    ("document", "alone", "fp32", "bf16", "fp16"),
    [
        ({"bf16": AUTO, "fp16": AUTO}, "bf16", "fp32", "bf16", "fp16"),
        ({"bf16": AUTO}, "bf16", "fp32", "bf16", "fp16"),
        ({"bfloat16": AUTO}, "bf16", "fp32", "bf16", "fp16"),
        ({"fp16": AUTO}, "bf16", "fp32", "bf16", "fp16"),
        ({"bf16": OFF, "fp16": AUTO}, "fp16", "fp32", "bf16.enabled=false", "fp16"),
        ({"bf16": AUTO, "fp16": OFF}, "bf16", "fp32", "bf16", "fp16.enabled=false"),
        ({"bf16": ON, "fp16": AUTO}, "bf16", "bf16.enabled=true", "bf16", "bf16.enabled=true"),
        ({"fp16": ON, "bf16": AUTO}, "fp16", "fp16.enabled=true", "fp16.enabled=true", "fp16"),
        ({"bf16": ON}, "bf16", "bf16.enabled=true", "bf16", "bf16.enabled=true"),
        ({"bf16": OFF, "fp16": OFF}, "fp32", "fp32", "bf16.enabled=false", "fp16.enabled=false"),
        ({"fp16": {"loss_scale": 0}}, "fp32", "fp32", "bf16", "fp16"),
        ({}, "fp32", "fp32", "bf16", "fp16"),
        (None, "fp32", "fp32", "bf16", "fp16"),
    ],
)
def test_precision_is_one_truth(tmp_path: Path, document: Any, alone: str, fp32: str, bf16: str, fp16: str) -> None:
    """What a JSON with this content and `train.precision` come to, or the key of the JSON that disagrees."""
    assert load(tmp_path, document).precision == alone
    for asked, outcome in (("fp32", fp32), ("bf16", bf16), ("fp16", fp16)):
        if "=" not in outcome:
            config = load(tmp_path, document, f"train.precision={asked}")
            assert config.precision == config.train.precision == outcome == asked
            continue
        with pytest.raises(UserError) as raised:
            load(tmp_path, document, f"train.precision={asked}")
        other = "false" if outcome.endswith("true") else "true"
        assert str(raised.value) == (
            f"ds.json: {outcome} disagrees with train.precision='{asked}' of run.yaml; write 'auto' or {other} here, "
            "or change the other"
        )


def test_a_precision_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        load(tmp_path, {"bf16": AUTO}, "train.precision=int8")
    assert str(raised.value) == "command line: train.precision='int8' is not 'fp32', 'bf16' or 'fp16'"


@pytest.mark.parametrize(
    ("document", "given", "notes"),
    [
        ({"bf16": {"enabled": True}, **zero(1, round_robin_gradients=False)}, [], []),
        ({"bf16": AUTO, **zero(2)}, ["train.precision=bf16"], []),
        ({"fp16": AUTO, "bf16": AUTO, **zero(2)}, [], ["bf16.enabled='auto' is taken for bf16, since train.precision"]),
        ({"fp16": AUTO, **zero(2)}, [], ["fp16.enabled='auto' is taken for bf16, since train.precision is not given"]),
        ({"bf16": {"enabled": True}, **zero(0)}, [], ["zero_optimization.stage=0 runs as stage 1: in bf16 the fp32"]),
        (
            {"fp16": {"enabled": True}},
            [],
            ["zero_optimization.stage is not given, which is stage 0, and runs as stage"],
        ),
        ({**zero(0)}, ["train.precision=fp16"], ["zero_optimization.stage=0 runs as stage 1: in fp16 the fp32"]),
        ({**zero(0)}, [], []),
        (None, ["train.precision=bf16"], []),
        (
            zero(2, round_robin_gradients=True),
            [],
            ["zero_optimization.round_robin_gradients=true is not used: it only"],
        ),
        (
            {"monitor_config": {"enabled": True, "tag": "mine"}},
            [],
            ["monitor_config.enabled=true is not used: DeepSp", "monitor_config.tag='mine' is not used: DeepSpeed"],
        ),
        ({"comms_config": {"verbose": True}}, [], ["comms_config.verbose=true is not used: DeepSpeed 0.19 does not"]),
    ],
)
def test_what_is_taken_otherwise_than_written_is_told(
    tmp_path: Path, document: Any, given: list[str], notes: list[str]
) -> None:
    found = load(tmp_path, document, *given).deepspeed.notes
    assert len(found) == len(notes), found
    for line, start in zip(found, notes, strict=True):
        assert line.startswith(f"ds.json: {start}")


def test_without_a_json_the_states_are_divided(tmp_path: Path) -> None:
    config = load(tmp_path, None)
    assert (config.precision, config.zero_stage, config.gradient_clipping) == ("fp32", 1, 1.0)
    config = load(tmp_path, None, "deepspeed.gradient_clipping=0.5", "train.precision=fp16")
    assert (config.precision, config.zero_stage, config.gradient_clipping) == ("fp16", 1, 0.5)
    assert load(tmp_path, None, "deepspeed.zero_optimization.stage=3").zero_stage == 3
    assert load(tmp_path, {}).zero_stage == 0


@pytest.mark.parametrize(
    ("params", "stated", "expected"),
    [
        ({"lr": "auto", "betas": "auto"}, {}, AdamW(3e-4, (0.9, 0.95), 1e-8, 0.0)),
        ({"lr": "auto", "betas": "auto"}, {"lr": 0.5}, AdamW(0.5, (0.9, 0.95), 1e-8, 0.0)),
        ({}, {"lr": 0.5, "weight_decay": 0.25}, AdamW(0.5, (0.9, 0.999), 1e-8, 0.25)),
        ({"lr": 0.5, "eps": 1e-6}, {"lr": 0.5, "betas": [0.5, 0.75]}, AdamW(0.5, (0.5, 0.75), 1e-6, 0.0)),
        ({"betas": [0.5, 0.75]}, {"betas": [0.5, 0.75]}, AdamW(1e-3, (0.5, 0.75), 1e-8, 0.0)),
        ({"lr": 0.5}, {"lr": 0.25}, "lr=0.25 disagrees with ds.json: optimizer.params.lr=0.5"),
        ({"betas": [0.5, 0.5]}, {"betas": [0.5, 0.75]}, "betas=[0.5, 0.75] disagrees with ds.json: optimizer.params.b"),
        ({"weight_decay": 0}, {"weight_decay": 0.1}, "weight_decay=0.1 disagrees with ds.json: optimizer.params.weig"),
    ],
)
def test_the_optimizer_may_stand_in_both_files_where_they_agree(
    tmp_path: Path, params: dict[str, Any], stated: dict[str, Any], expected: AdamW | str
) -> None:
    run = RUN | {"train": RUN["train"] | {"optimizer": stated}}
    document = {"optimizer": {"type": "AdamW", "params": params}}
    if isinstance(expected, str):
        with pytest.raises(UserError) as raised:
            load(tmp_path, document, run=run)
        assert str(raised.value).startswith(f"run.yaml: train.optimizer.{expected}")
        assert str(raised.value).endswith("; write 'auto' there, or state it once")
        return
    config = load(tmp_path, document, run=run)
    assert config.optimizer.model_dump(exclude={"name"}) == expected.plain() | {"betas": expected.betas}
    assert config.train.optimizer is None


@pytest.mark.parametrize(
    ("scheduler", "schedule", "expected"),
    [
        ({"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}, None, 1),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}, {"warmup_steps": 0}, 1),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}, {"warmup_steps": 9}, 9),
        ({"type": "WarmupLR", "params": {}}, {"warmup_steps": 9}, 9),
        ({"type": "WarmupLR", "params": {}}, None, 1000),  # DeepSpeed's own default, written out
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 9}}, {"warmup_steps": 9}, 9),
        (
            {"type": "WarmupLR", "params": {"warmup_num_steps": 9}},
            {"warmup_steps": 8},
            "train.schedule.warmup_steps=8 disagrees with ds.json: scheduler.params.warmup_num_steps=9; write 'auto' "
            "there, or state it once",
        ),
        (
            {"type": "WarmupLR", "params": {}},
            {"name": "linear", "warmup_steps": 8},
            "train.schedule stands beside ds.json: scheduler, which states another; delete train.schedule here (or all "
            "of it but warmup_steps), or scheduler there (or write 'auto' for all its params)",
        ),
        (
            {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1}},
            {"warmup_steps": 8},
            "train.schedule stands beside ds.json: scheduler, which states another; delete train.schedule here, or "
            "scheduler there",
        ),
    ],
)
def test_the_schedulers_warm_up_follows_the_run_file(
    tmp_path: Path, scheduler: dict[str, Any], schedule: Any, expected: int | str
) -> None:
    run = RUN | {"train": RUN["train"] | {"schedule": schedule}}
    if isinstance(expected, str):
        with pytest.raises(UserError) as raised:
            load(tmp_path, {"scheduler": scheduler}, run=run)
        assert str(raised.value) == f"run.yaml: {expected}"
        return
    resolved = load(tmp_path, {"scheduler": scheduler}, run=run).deepspeed.scheduler
    assert resolved is not None
    assert resolved["params"]["warmup_num_steps"] == expected


ALL_AUTO = {
    "type": "WarmupDecayLR",
    "params": {
        **dict.fromkeys(("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
        "last_batch_iteration": -1,
    },
}


@pytest.mark.parametrize(
    ("scheduler", "schedule", "gives_way"),
    [
        (ALL_AUTO, {"name": "cosine", "warmup_steps": 3}, True),
        (ALL_AUTO, {"min_lr": 0.0}, True),
        (ALL_AUTO, {"warmup_steps": 3}, False),  # which fills its warm-up in
        (ALL_AUTO, {}, False),
        (ALL_AUTO, None, False),
    ],
)
def test_a_scheduler_that_is_all_auto_gives_way_to_the_run_files(
    tmp_path: Path, scheduler: dict[str, Any], schedule: Any, gives_way: bool
) -> None:
    run = RUN | {"train": RUN["train"] | {"schedule": schedule}}
    config = load(tmp_path, {"scheduler": scheduler}, run=run).resolve(world_size=None, vocab_size=64)
    assert (config.deepspeed.scheduler is None) == gives_way
    assert (config.train.schedule is not None) == gives_way
    told = [note for note in config.deepspeed.notes if note.startswith("ds.json: scheduler is left out")]
    assert len(told) == gives_way
    assert "scheduler" not in config.to_yaml() or not gives_way
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_run_config(again).resolve(world_size=None, vocab_size=64) == config


@pytest.mark.parametrize("params", [{"warmup_max_lr": 1e-3}, {"warmup_type": "linear"}])
def test_a_scheduler_of_values_stays_refused_beside_the_run_files(tmp_path: Path, params: dict[str, Any]) -> None:
    scheduler = {"type": ALL_AUTO["type"], "params": {**ALL_AUTO["params"], **params}}
    run = RUN | {"train": RUN["train"] | {"schedule": {"name": "cosine"}}}
    with pytest.raises(UserError) as raised:
        load(tmp_path, {"scheduler": scheduler}, run=run)
    for part in ("run.yaml: train.schedule", "ds.json: scheduler", "delete train.schedule", "'auto'"):
        assert part in str(raised.value)


def test_an_optimizer_that_is_all_auto_follows_the_run_files(tmp_path: Path) -> None:
    params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    stated = {"name": "adamw", "lr": 0.5, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.25}
    run = RUN | {"train": RUN["train"] | {"optimizer": stated}}
    config = load(tmp_path, {"optimizer": {"type": "AdamW", "params": params}}, run=run)
    assert config.optimizer.model_dump() == {**stated, "betas": (0.8, 0.9)}


def test_deepspeed_is_told_to_print_never(tmp_path: Path) -> None:
    for never in (float("inf"), "inf", "Infinity"):
        settings = load(tmp_path, {"steps_per_print": never}).deepspeed
        assert "steps_per_print" not in settings.engine_config(1, 1)
        assert not settings.asks_deepspeed_to_report
    assert load(tmp_path, {"steps_per_print": 2000}).deepspeed.asks_deepspeed_to_report


# ---------------------------------------------------------------------------------------------------- what is refused

NO_ADAMW = "optimizer.type={} is not 'AdamW' or 'Adam'"

BAD: list[tuple[dict[str, Any], str]] = [
    # keys that DeepSpeed ignores in silence
    ({"gradient_cliping": 1.0}, "gradient_cliping is not a key; did you mean 'gradient_clipping'?"),
    (zero(1, stge=2), "zero_optimization.stge is not a key; did you mean 'stage'?"),
    ({"bf16": {"enable": True}}, "bf16.enable is not a key; did you mean 'enabled'?"),
    (
        zero(2, offload_optimizer={"device": "cpu", "pin_memry": True}),
        "zero_optimization.offload_optimizer.pin_memry is not a key; did you mean 'pin_memory'?",
    ),
    (
        {"optimizer": {"type": "AdamW", "parms": {}}},
        "optimizer.parms is not a key; did you mean 'params'?",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"weight_decy": 0}}},
        "optimizer.params.weight_decy is not a key; did you mean 'weight_decay'?",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_step": 3}}},
        "scheduler.params.warmup_num_step is not a key; did you mean 'warmup_num_steps'?",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 3}}},
        "scheduler.params.total_num_steps is not a key; did you mean 'warmup_num_steps'?",
    ),
    (
        {"flops_profiler": {"enabled": False, "topmodules": 1}},
        "flops_profiler.topmodules is not a key; did you mean 'top_modules'?",
    ),
    (
        {"data_efficiency": {"data_sampling": {"num_epoch": 1}}},
        "data_efficiency.data_sampling.num_epoch is not a key; did you mean 'num_epochs'?",
    ),
    (
        {"timers": {"throughput": {"enable": True}}},
        "timers.throughput.enable is not a key; did you mean 'enabled'?",
    ),
    ({"bf16": {"x": None}}, "bf16.x is not a key; allowed: enabled"),
    # values
    (zero(4), "zero_optimization.stage=4 is not 0, 1, 2 or 3"),
    (zero(True), "zero_optimization.stage=true is not 0, 1, 2 or 3"),
    (
        {"zero_optimization": {"stage": "auto"}},
        "zero_optimization.stage='auto' has nothing to follow; write 0, 1, 2 or 3",
    ),
    ({"zero_optimization": True}, "zero_optimization=true is not a section; write {stage: ...}"),
    ({"gradient_clipping": -1}, "gradient_clipping=-1 is not a number of at least 0"),
    ({"gradient_clipping": "1.0"}, "gradient_clipping='1.0' is not a number of at least 0"),
    ({"train_batch_size": 0}, "train_batch_size=0 is not an integer of at least 1"),
    ({"fp16": {"min_loss_scale": 1e-5}}, "fp16.min_loss_scale=1e-05 is not an integer of at least 1"),
    ({"communication_data_type": "int8"}, "communication_data_type='int8' is not 'fp32', 'bf16' or 'fp16'"),
    (zero(1, overlap_comm="yes"), "zero_optimization.overlap_comm='yes' is not true or false"),
    (zero(1, reduce_bucket_size=0.5), "zero_optimization.reduce_bucket_size=0.5 is not an integer of at least 1"),
    # precision
    ({"fp16": {"enabled": True}, **BF16_ON}, "fp16.enabled=true stands beside bf16.enabled=true; keep one of them"),
    ({"bfloat16": {"enabled": True}, **BF16_ON}, "bfloat16 stands beside bf16, its newer name; keep bf16"),
    (
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        "torch_autocast.enabled=true is refused: train.precision, bf16 and fp16 state the precision, and nothing else "
        "does; "
        "write bf16: {enabled: true}",
    ),
    (
        {"amp": {"enabled": True, "opt_level": "O1"}},
        "amp.enabled=true is refused: DeepSpeed 0.19 has no Apex AMP any more; write bf16: {enabled: true} or "
        "fp16: {enabled: true}",
    ),
    (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        "data_types.grad_accum_dtype='bf16' does not go with parameters in fp32; write 'fp32'",
    ),
    (
        {"data_types": {"grad_accum_dtype": "fp16"}, **BF16_ON},
        "data_types.grad_accum_dtype='fp16' does not go with parameters in bf16; write 'fp32' or 'bf16'",
    ),
    (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "bf16.bf16_master_weights_and_grads=true is refused: master weights are fp32; write false",
    ),
    # optimizer
    (
        {"optimizer": {"type": "OneBitAdam"}},
        "optimizer.type='OneBitAdam' is refused: its compressed all-reduce is in DeepSpeed's nccl and mpi backends "
        "alone, and takes no ZeRO stage 2 or 3; write 'AdamW'",
    ),
    ({"optimizer": {"type": "Lamb", "params": {"max_coeff": 1}}}, NO_ADAMW.format("'Lamb'")),
    ({"optimizer": {"params": {"lr": 1}}}, "optimizer.type is missing; write 'AdamW' or 'Adam'"),
    ({"optimizer": "AdamW"}, "optimizer='AdamW' is not a section; write {type: ...}"),
    (
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        "optimizer.params.adam_w_mode=false is refused: Adam with L2 regularisation is not available; "
        "write true, which is AdamW",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
        "optimizer.params.max_grad_norm=1.0 is refused: DeepSpeed takes it as gradient_clipping; "
        "write gradient_clipping",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}},
        "optimizer.params.betas=[0.9] is not two numbers, each at least 0 and under 1",
    ),
    # scheduler
    (
        {"scheduler": {"type": "WarmupLinear"}},
        "scheduler.type='WarmupLinear' is not 'WarmupLR', 'WarmupDecayLR', 'WarmupCosineLR', 'OneCycle' "
        "or 'LRRangeTest'",
    ),
    (
        {"scheduler": {"type": "WarmupCosineLR", "params": None}},
        "scheduler.params.total_num_steps is missing; write an integer of at least 1, or 'auto'",
    ),
    (
        {"scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": 1}}},
        "scheduler.params.cycle_min_lr is missing; write a number of at least 0",
    ),
    (
        {"scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": 1, "cycle_min_lr": "auto"}}},
        "scheduler.params.cycle_min_lr='auto' has nothing to follow; write a number of at least 0",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, 0.2]}}},
        "scheduler.params.warmup_max_lr=[0.1, 0.2] is not a number above 0",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cosine"}}},
        "scheduler.params.warmup_type='cosine' is not 'log' or 'linear'",
    ),
    # offload
    (
        zero(0, offload_optimizer={"device": "cpu"}),
        "zero_optimization.offload_optimizer.device='cpu' does not go with ZeRO stage 0; use stage 1, 2 or 3",
    ),
    (
        zero(2, offload_param={"device": "cpu"}),
        "zero_optimization.offload_param.device='cpu' does not go with ZeRO stage 2; use stage 3",
    ),
    (
        zero(2, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}),
        "zero_optimization.offload_optimizer.device='nvme' does not go with ZeRO stage 2; use stage 3",
    ),
    (
        zero(3, offload_param={"device": "nvme"}),
        "zero_optimization.offload_param.nvme_path is missing; write the folder on the NVMe device",
    ),
    (
        zero(3, offload_param={"pin_memory": True}),
        "zero_optimization.offload_param.device is missing; write 'cpu', 'nvme' or 'none'",
    ),
    (
        zero(3, offload_param={"device": "gpu"}),
        "zero_optimization.offload_param.device='gpu' is not 'none', 'cpu' or 'nvme'",
    ),
    (
        zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        "zero_optimization.offload_optimizer.ratio=0.5 is refused: a share on the device needs DeepSpeed's CPUAdam; "
        "write 1.0",
    ),
    (
        zero(2, cpu_offload=True),
        "zero_optimization.cpu_offload=true is refused: it is deprecated; write offload_optimizer: {device: cpu}",
    ),
    # what cannot be had
    (
        {"activation_checkpointing": {"contiguous_memory_optimization": True}},
        "activation_checkpointing.contiguous_memory_optimization=true is refused: torch's allocator reuses the memory "
        "of inputs of one size; write false",
    ),
    (
        {"activation_checkpointing": {"profile": True}},
        "activation_checkpointing.profile=true is refused: forwards and backwards are timed by train.trace_steps; "
        "write false",
    ),
    (
        {"activation_checkpointing": {"number_checkpoints": 2}, "pipeline": {"activation_checkpoint_interval": 1}},
        "pipeline.activation_checkpoint_interval=1 stands beside activation_checkpointing.number_checkpoints=2; "
        "keep one of them",
    ),
    (
        {"pipeline": {"partition": "type:Block"}},
        "pipeline.partition='type:Block' is refused: the run file partitions the layers; write parallel.stage_layers",
    ),
    (
        zero(3, zero_quantized_weights=True),
        "zero_optimization.zero_quantized_weights=true is refused: ZeRO++ quantises and regroups in CUDA kernels of "
        "DeepSpeed's over nccl, and gloo on CPUs has none of them; write false",
    ),
    (
        zero(3, zero_hpz_partition_size=8),
        "zero_optimization.zero_hpz_partition_size=8 is refused: ZeRO++'s second copy of the weights lies on ranks "
        "that stand side by side, here tensor neighbours; write 1",
    ),
    (
        zero(3, mics_shard_size=8),
        "zero_optimization.mics_shard_size=8 is refused: DeepSpeed 0.19 has no MiCS any more; leave it out",
    ),
    (
        {**zero(1), "prescale_gradients": True},
        "prescale_gradients=true is not taken by DeepSpeed at ZeRO stage 1; write false",
    ),
    (
        {"gradient_allreduce_op": "sum"},
        "gradient_allreduce_op='sum' is refused: the loss is the mean over the global batch; write 'mean'",
    ),
    (
        {"sparse_attention": {"mode": "fixed"}},
        "sparse_attention is refused: DeepSpeed 0.19 has no sparse attention any more; leave it out",
    ),
    (
        {"compression_training": {}},
        "compression_training is refused: DeepSpeed 0.19 has no compression library any more; leave it out",
    ),
    (
        {"curriculum_learning": {"enabled": True}},
        "curriculum_learning is refused: DeepSpeed 0.19 has no curriculum learning at the top level any more; "
        "leave it out",
    ),
    (
        {"tensor_parallel": {"autotp_size": 4}},
        "tensor_parallel.autotp_size=4 is refused: megalite shards its own layers; write parallel.tensor",
    ),
    (
        {"tensorboard": {"enabled": True}},
        "tensorboard.enabled=true is refused: under a pipeline DeepSpeed would record a stage's gradient product as "
        "the loss; read metrics.jsonl and tensorboard/ in run.dir",
    ),
    (
        {"data_efficiency": {"enabled": True}},
        "data_efficiency.enabled=true is refused: samples come in one order, of seed and step; leave it out",
    ),
    (
        {"elasticity": {"enabled": True, "version": 0.2}},
        "elasticity.enabled=true is refused: DeepSpeed 0.19 has no elastic training any more; leave it out",
    ),
    (zero(2, round_robin_gradients="yes"), "zero_optimization.round_robin_gradients='yes' is not true or false"),
    (
        zero(3, max_live_parameters=1, stage3_max_live_parameters=1),
        "zero_optimization.max_live_parameters stands beside stage3_max_live_parameters, another name for it; "
        "keep stage3_max_live_parameters",
    ),
    (
        {"monitor_config": {"csv_monitor": {"enabld": False}}},
        "monitor_config.csv_monitor.enabld is not a key; did you mean 'enabled'?",
    ),
    (
        {"monitor_config": {"wandb": {"enabled": True}}},
        "monitor_config.wandb.enabled=true is refused: DeepSpeed 0.19 does not read it there; read metrics.jsonl and "
        "tensorboard/ in run.dir",
    ),
    ({"gradient_clipping": float("inf")}, "gradient_clipping=Infinity is not a number of at least 0"),
    ({"gradient_clipping": float("nan")}, "gradient_clipping=NaN is not a number of at least 0"),
    (
        zero(2, reduce_bucket_size=float("inf")),
        "zero_optimization.reduce_bucket_size=Infinity is not an integer of at least 1",
    ),
    ({"steps_per_print": 0}, "steps_per_print=0 is not an integer of at least 1, or Infinity for never"),
    (
        {"steps_per_print": float("-inf")},
        "steps_per_print=-Infinity is not an integer of at least 1, or Infinity for never",
    ),
    (
        {"bf16": {"enabled": "auto"}, "data_types": {"grad_accum_dtype": "fp16"}},
        "data_types.grad_accum_dtype='fp16' does not go with parameters in bf16; write 'fp32' or 'bf16'",
    ),
    (
        {**BF16_ON, "prescale_gradients": True},
        "prescale_gradients=true is not taken by DeepSpeed at ZeRO stage 1; write false",
    ),
    (
        {"zero_optimization": {"stage": 2, "allgather_bucket_size": 25}},
        "zero_optimization.allgather_bucket_size=25 is not an even integer of at least 2",
    ),
    (
        {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 1000}},
        "zero_optimization.stage3_module_granularity_threshold=1000 is refused: gradients of modules that DeepSpeed "
        "gathers as one are not reduced once a step; write 0",
    ),
    (
        {"fp16": {"enabled": True, "initial_scale_power": 63}},
        "fp16.initial_scale_power=63 is not an integer from 0 to 62",
    ),
]


@pytest.mark.parametrize(("data", "expected"), BAD, ids=[expected.split(" ")[0] for _, expected in BAD])
def test_a_json_that_is_wrong(data: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(data)
    assert str(raised.value) == f"run.yaml: deepspeed.{expected}"


def test_a_key_without_a_neighbour_is_told_what_can_be_used() -> None:
    with pytest.raises(UserError) as raised:
        parse({"zzz": 1})
    allowed = str(raised.value).removeprefix("run.yaml: deepspeed.zzz is not a key; allowed: ").split(", ")
    assert {"bf16", "zero_optimization", "optimizer"} <= set(allowed)
    assert not {"amp", "sparse_attention", "tensorboard"} & set(allowed)


def test_faults_do_not_breed_faults() -> None:
    """A stage that cannot be read says nothing of whether the offload goes with it."""
    with pytest.raises(UserError) as raised:
        parse(zero(7, offload_param={"device": "cpu"}))
    assert str(raised.value) == "run.yaml: deepspeed.zero_optimization.stage=7 is not 0, 1, 2 or 3"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"fp16": {"enabled": true, "enabled": false}}', "ds.json: enabled stands twice in one section; keep one"),
        ("[1]", "ds.json: the file holds [1]; write a JSON object"),
        ('{"a": 1', "ds.json: line 1, column 8: no JSON: Expecting ',' delimiter"),
    ],
)
def test_a_file_that_is_no_deepspeed_json(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_json(path)
    assert str(raised.value) == expected


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(path) == {}


# --------------------------------------------------------------------------------------------- against DeepSpeed itself


@pytest.fixture(scope="module")
def deepspeed() -> Any:
    return pytest.importorskip("deepspeed")


class Asked(dict[str, Any]):
    """A JSON that remembers which keys it was asked for."""

    def __init__(self, content: dict[str, Any], keys: set[str]) -> None:
        super().__init__(content)
        self.keys_asked = keys

    def __copy__(self) -> "Asked":
        return Asked(self, self.keys_asked)

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return _Keys(self)


class _Keys:
    def __init__(self, owner: Asked) -> None:
        self.owner = owner

    def __contains__(self, key: object) -> bool:
        return key in self.owner

    def __iter__(self) -> Iterator[str]:
        return iter(list(dict.keys(self.owner)))


def test_the_table_has_the_keys_that_deepspeed_reads_or_refuses_and_no_others(deepspeed: Any) -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    asked: set[str] = set()
    DeepSpeedConfig(Asked({"train_batch_size": 1}, asked))
    assert {"gradient_clipping", "zero_optimization", "comms_logger"} <= asked  # the spy sees what it should
    read_elsewhere = {"sequence_parallel_size"}
    read_nowhere = {"comms_config", "monitor_config"}
    theirs = asked - {"bfloat16"} | set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(TABLE) - read_elsewhere - read_nowhere == theirs


def fields(model: Any) -> set[str]:
    """The JSON names of a DeepSpeed section."""
    return {info.alias or name for name, info in model.model_fields.items()}


def all_names(model: Any) -> set[str]:
    """The JSON names of a DeepSpeed section, the second names of fields among them."""
    return fields(model) | set(model.model_fields)


def test_zeros_keys_are_taken_by_each_name_that_deepspeed_takes(deepspeed: Any) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    second = all_names(DeepSpeedZeroConfig) - fields(DeepSpeedZeroConfig)
    assert len(second) == 9
    for name in second:
        first = DeepSpeedZeroConfig.model_fields[name].alias
        assert first is not None
        value = False if "use_all" in name or "gather" in name else 0
        assert parse(zero(3, **{name: value})) == parse(zero(3, **{first: value}))


def test_the_sections_have_the_fields_of_deepspeeds_and_no_others(deepspeed: Any) -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS, HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    ours_and_theirs = [
        (ZERO, fields(DeepSpeedZeroConfig) | set(_REMOVED_ZERO_CONFIG_KEYS)),
        (OFFLOAD_PARAM, fields(DeepSpeedZeroOffloadParamConfig)),
        (OFFLOAD_OPTIMIZER, fields(DeepSpeedZeroOffloadOptimizerConfig)),
        (FP16, fields(DeepSpeedFP16Config)),
        (BF16, fields(DeepSpeedBF16Config)),
        (TABLE["comms_logger"], fields(CommsLoggerConfig)),
        (TABLE["timers"]["throughput"], fields(DeepSpeedThroughputTimerConfig)),  # type: ignore[index]
        (TABLE["tensorboard"], fields(TensorBoardConfig)),
        (TABLE["wandb"], fields(WandbConfig)),
        (TABLE["csv_monitor"], fields(CSVConfig)),
        (TABLE["comet"], fields(CometConfig)),
        (TABLE["compile"], fields(CompileConfig)),
        (TABLE["hybrid_engine"], fields(HybridEngineConfig)),
        (TABLE["tensor_parallel"], all_names(TPTrainingConfig)),
    ]
    for ours, theirs in ours_and_theirs:
        names = set(ours.keys) if isinstance(ours, Off) else set(ours)  # type: ignore[arg-type]
        assert names == theirs


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedulers_parameters_are_deepspeeds(deepspeed: Any, name: str) -> None:
    from deepspeed.runtime import lr_schedules

    parameters = dict(inspect.signature(getattr(lr_schedules, name)).parameters)
    del parameters["optimizer"]
    assert set(SCHEDULERS[name]) == set(parameters)
    required = [key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    assert sorted(REQUIRED_BY_SCHEDULER.get(name, ())) == sorted(required)
    assert set(lr_schedules.VALID_LR_SCHEDULES) == set(SCHEDULERS)


def test_the_optimizers_parameters_and_defaults_are_deepspeeds(deepspeed: Any) -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    for adam in (FusedAdam, DeepSpeedCPUAdam):
        parameters = inspect.signature(adam).parameters
        assert set(parameters) - {"params", "model_params", "adamw_mode"} <= set(ADAM_PARAMS)
        for name in ("lr", "betas", "eps", "weight_decay"):
            assert parameters[name].default == getattr(DEEPSPEED_ADAMW, name)


def test_deepspeeds_default_clipping_is_the_one_we_write_out(deepspeed: Any) -> None:
    from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

    assert parse({}).gradient_clipping == GRADIENT_CLIPPING_DEFAULT


OUR_FILES = sorted([*CONFIGS.glob("*.json"), *CONFIGS.parents[1].glob("examples/*/*.json")])


@pytest.mark.parametrize("path", OUR_FILES, ids=[path.stem for path in OUR_FILES])
def test_our_files_are_taken_by_us_and_by_deepspeed(deepspeed: Any, path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = parse(read_json(path)).resolve_auto(hidden_size=64, steps=10, lr=1e-3)
    config = DeepSpeedConfig(settings.engine_config(2, 4))
    assert config.zero_optimization_stage == settings.zero_stage
    assert config.bfloat16_config.enabled == (settings.precision == "bf16")
    assert config.float16_config.enabled == (settings.precision == "fp16")
    assert config.gradient_clipping == settings.gradient_clipping == 1.0
    if path.parent == CONFIGS:
        stage, precision = path.stem.split("_")[:2]
        assert (f"zero{settings.zero_stage}", settings.precision) == (stage, precision)
        assert (config.zero_config.offload_param is not None) == path.stem.endswith("_offload")


HONOURED_FLAGS = sorted(
    key for key, rule in ZERO.items() if isinstance(rule, Honoured) and rule.kind.words == "true or false"
)


def test_honoured_zero_keys_reach_deepspeeds_config(deepspeed: Any) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {info.alias or name: name for name, info in DeepSpeedZeroConfig.model_fields.items()}
    for value in (True, False):
        section = {key: value for key in HONOURED_FLAGS if key != "stage3_gather_fp16_weights_on_model_save"}
        config = DeepSpeedZeroConfig(**parse(zero(3, **section)).engine_config(1, 1)["zero_optimization"])
        assert {key: getattr(config, names[key]) for key in section} == section


def test_the_page_says_what_the_table_says() -> None:
    from deepspeed_json_page import deepspeed_table

    page = Path(__file__).parents[2] / "docs" / "reference" / "deepspeed_json.md"
    hint = "make it anew: python tools/deepspeed_json_page.py > docs/reference/deepspeed_json.md"
    assert page.read_text(encoding="utf-8") == deepspeed_table(), hint


def test_the_page_has_every_key() -> None:
    from deepspeed_json_page import deepspeed_table

    page = deepspeed_table()
    assert all(f"| `{key}" in page for key in TABLE)
    assert all(f"| `zero_optimization.{key}" in page for key in ZERO)
