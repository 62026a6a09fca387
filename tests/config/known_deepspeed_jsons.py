"""DeepSpeed JSONs that many people have: those that transformers, accelerate, LLaMA-Factory and axolotl hand out."""

from typing import Any

_FP16 = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
_AUTO_PRECISION = {"fp16": {"enabled": "auto", **_FP16}, "bf16": {"enabled": "auto"}}
_AUTO_SIZES = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
_ON_CPU = {"device": "cpu", "pin_memory": True}
_AUTO_STAGE_3 = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
_WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}


def _transformers(zero: dict[str, Any]) -> dict[str, Any]:
    adamw = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    return {
        **_AUTO_PRECISION,
        "optimizer": {"type": "AdamW", "params": adamw},
        "scheduler": {"type": "WarmupLR", "params": _WARMUP},
        "zero_optimization": zero,
        **_AUTO_SIZES,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }


def _accelerate(zero: dict[str, Any], **adamw: Any) -> dict[str, Any]:
    return {
        "fp16": {"enabled": True, **_FP16},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", **adamw}},
        "scheduler": {"type": "WarmupDecayLR", "params": {**_WARMUP, "total_num_steps": "auto"}},
        "zero_optimization": zero,
        **_AUTO_SIZES,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }


def _llama_factory(zero: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        **_AUTO_SIZES,
        "zero_allow_untested_optimizer": True,
        **_AUTO_PRECISION,
        "zero_optimization": zero,
        **more,
    }


def _axolotl(zero: dict[str, Any], **more: Any) -> dict[str, Any]:
    fp16 = {"enabled": "auto", "auto_cast": False, **_FP16, "initial_scale_power": 32}
    precision = {} if "bf16" in more else {"bf16": {"enabled": "auto"}, "fp16": fp16}
    return {"zero_optimization": zero, **precision, **more, **_AUTO_SIZES, "wall_clock_breakdown": False}


_HF_2 = {
    "stage": 2,
    "offload_optimizer": _ON_CPU,
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
_HF_3 = {
    "stage": 3,
    "offload_optimizer": _ON_CPU,
    "offload_param": _ON_CPU,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    **_AUTO_STAGE_3,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
_AT_1_OR_2 = {key: value for key, value in _HF_2.items() if key not in ("offload_optimizer", "stage")}
_LF_0_OR_2 = {**_AT_1_OR_2, "allgather_bucket_size": 5e8, "reduce_bucket_size": 5e8, "round_robin_gradients": True}
_LF_3 = {key: value for key, value in _HF_3.items() if not key.startswith("offload_")}
_LF_MONITOR = {
    "comms_config": {"verbose": False},
    "monitor_config": {"enabled": True, "tag": "DeepSpeedMonitor", "csv_monitor": {"enabled": False}},
}
_AXOLOTL_3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 0,
    **_AUTO_STAGE_3,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_gather_16bit_weights_on_model_save": True,
}
_AXOLOTL_3_SHORT = {
    **{key: value for key, value in _AXOLOTL_3.items() if not key.startswith("stage3_m") and "gather" not in key},
    "max_live_parameters": 0,
    "max_reuse_distance": 0,
    "gather_16bit_weights_on_model_save": True,
}
_AUTO_ADAMW = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    }
}

KNOWN: dict[str, dict[str, Any]] = {
    "transformers ds_config_zero2": _transformers(_HF_2),
    "transformers ds_config_zero2, no offload": _transformers({**_HF_2, "offload_optimizer": {"device": "none"}}),
    "transformers ds_config_zero3": _transformers(_HF_3),
    "transformers ds_config_zero3, fp16 alone": {
        key: value for key, value in _transformers(_HF_3).items() if key != "bf16"
    },
    "accelerate zero_stage1_config": _accelerate(
        {**_AT_1_OR_2, "stage": 1, "reduce_bucket_size": "auto"}, torch_adam=True, adam_w_mode=True
    ),
    "accelerate zero_stage2_config": _accelerate(
        {**_AT_1_OR_2, "stage": 2, "reduce_bucket_size": "auto"}, torch_adam=True, adam_w_mode=True
    ),
    "accelerate zero_stage2_offload_config": _accelerate(_HF_2),
    "accelerate zero_stage3_config": _accelerate({**_LF_3, "stage3_gather_16bit_weights_on_model_save": "auto"}),
    "accelerate zero_stage3_offload_config": _accelerate(
        {**_HF_3, "stage3_gather_16bit_weights_on_model_save": "auto"}
    ),
    "accelerate's plugin": {
        **_AUTO_SIZES,
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none", "nvme_path": None},
            "offload_param": {"device": "none", "nvme_path": None},
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "steps_per_print": float("inf"),
        "fp16": {"enabled": False},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    },
    "LLaMA-Factory ds_z0_config": _llama_factory({"stage": 0, **_LF_0_OR_2, "overlap_comm": False}, **_LF_MONITOR),
    "LLaMA-Factory ds_z2_config": _llama_factory({"stage": 2, **_LF_0_OR_2}),
    "LLaMA-Factory ds_z2_offload_config": _llama_factory({"stage": 2, "offload_optimizer": _ON_CPU, **_LF_0_OR_2}),
    "LLaMA-Factory ds_z3_config": _llama_factory(_LF_3),
    "LLaMA-Factory ds_z3_offload_config": _llama_factory(_HF_3, **_LF_MONITOR),
    "axolotl zero1": _axolotl({"stage": 1, "overlap_comm": True}, **_AUTO_ADAMW),
    "axolotl zero2": _axolotl(
        {"stage": 2, "offload_optimizer": {"device": "cpu"}, "contiguous_gradients": True, "overlap_comm": True}
    ),
    "axolotl zero3": _axolotl(_AXOLOTL_3),
    "axolotl zero3_bf16": _axolotl(_AXOLOTL_3, bf16={"enabled": True}),
    "axolotl zero3_bf16_cpuoffload_all": _axolotl(
        {**_AXOLOTL_3_SHORT, "offload_optimizer": _ON_CPU, "offload_param": _ON_CPU},
        bf16={"enabled": True},
        zero_force_ds_cpu_optimizer=False,
        zero_allow_untested_optimizer=True,
    ),
}
