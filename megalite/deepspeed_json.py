"""DeepSpeed's JSON, taken as users have it: every key is honoured, derived, or refused with what to write instead.

``TABLE`` holds every section and key that DeepSpeed 0.19.8 documents or reads. DeepSpeed itself ignores a misspelt
key in silence (``gradient_cliping``); here a key outside the table is an error that names its nearest neighbour.

- `Honoured`: handed to the engine as written. ``"auto"`` means DeepSpeed's default, or what `resolve_auto` computes.
- `Derived`: stated once, in the run file; here it may be ``"auto"`` or must agree.
- `Unused`: accepted, left out, and told of at the start: it changes no number, or DeepSpeed does not read it.
- `Refused`: cannot be had. A value that asks for nothing (``false``, the default) is accepted and left out.

The document that results is plain JSON: `DeepSpeedSettings.engine_config` is what ``deepspeed.initialize`` is given.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from megalite.errors import UserError, nearest
from megalite.faults import (
    BETAS,
    FLAG,
    NOT_NEGATIVE,
    PATH_TEXT,
    POSITIVE,
    TEXT,
    TEXTS,
    Fault,
    Key,
    Kind,
    Origin,
    alternatives,
    choice,
    number,
    read_text,
    report,
    show,
    whole,
)
from megalite.paths import spell

Precision = Literal["fp32", "bf16", "fp16"]


# --------------------------------------------------------------------------------------------------- rules of a key

AutoMeaning = Literal["default", "resolved", "refused"]


@dataclass(frozen=True, slots=True)
class Honoured:
    """Handed to the engine as written."""

    kind: Kind
    auto: AutoMeaning = "default"
    """What "auto" means: DeepSpeed's default, a value computed by `resolve_auto`, or an error."""


@dataclass(frozen=True, slots=True)
class Derived:
    """Follows from the run file: "auto", or the same value."""

    kind: Kind
    follows: str


@dataclass(frozen=True, slots=True)
class Unused:
    """Accepted and left out; a value other than `quiet` is told of, with the reason."""

    kind: Kind
    reason: str
    quiet: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """Cannot be had, unless the value asks for nothing."""

    reason: str
    instead: str
    harmless: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Off:
    """A section that may stand only while its switch is off; its keys are known, so that a misspelt one is found."""

    reason: str
    instead: str
    keys: Mapping[str, Any]
    switch: str = "enabled"
    off: tuple[object, ...] = (False, None)


@dataclass(frozen=True, slots=True)
class ByType:
    """A section of ``type`` and ``params``: the type says which parameters there are."""

    params: Mapping[str, Mapping[str, Any]]
    """The rules of the parameters, by type."""
    required: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The parameters that have no default, by type."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Rules of the keys beside ``type`` and ``params``."""
    refused: Mapping[str, Refused] = field(default_factory=dict)
    """Types that DeepSpeed has and that cannot be had here, with the reason."""


Rule = Honoured | Derived | Unused | Refused | Off | ByType | Mapping[str, Any]
"""A mapping is a section: its keys and their rules."""


def _even(value: Any) -> int:
    if value % 2:
        raise ValueError
    return whole(2).convert(value)


_EVEN = Kind("an even integer of at least 2", _even)


def _count_or_never(value: Any) -> int | None:
    # accelerate writes Infinity, in JSON or as a string.
    if value in (math.inf, "inf", "Infinity"):
        return None
    return whole(1).convert(value)


_COUNT_OR_NEVER = Kind("an integer of at least 1, or Infinity for never", _count_or_never)


def _flags(keys: str) -> dict[str, Rule]:
    return {key: Honoured(FLAG) for key in keys.split()}


def _known(keys: str, **sections: Any) -> dict[str, Any]:
    return {**dict.fromkeys(keys.split()), **sections}


def _removed(feature: str) -> Refused:
    return Refused(f"DeepSpeed 0.19 has no {feature} any more", "leave it out")


def _monitor(keys: str) -> Off:
    reason = "under a pipeline DeepSpeed would record a stage's gradient product as the loss"
    return Off(reason, "read metrics.jsonl and tensorboard/ in run.dir", _known(keys))


_MONITORS = {
    "tensorboard": "enabled output_path job_name",
    "csv_monitor": "enabled output_path job_name",
    "wandb": "enabled group team project",
    "comet": "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode",
}


_NOT_ADAMW = "AdamW is the only optimizer here"
_OWN_ADAMW = "megalite takes the fastest right AdamW on each device"
_ZERO_PP = "ZeRO++ quantises and regroups in CUDA kernels of DeepSpeed's over nccl, and gloo on CPUs has none of them"
_SECOND_COPY = "ZeRO++'s second copy of the weights lies on ranks that stand side by side, here tensor neighbours"
_ONE_BIT = "its compressed all-reduce is in DeepSpeed's nccl and mpi backends alone, and takes no ZeRO stage 2 or 3"
_ULYSSES = "it belongs to Ulysses, which divides attention by heads on an axis of its own"
_ULYSSES_INSTEAD = "write parallel.sequence_parallel, which divides the tokens over the tensor axis"
_OWN_CHECKPOINTS = "megalite writes checkpoints of its own"
_ONE_PRECISION = "train.precision, bf16 and fp16 state the precision, and nothing else does"
_NOT_READ = "DeepSpeed 0.19 does not read it"

RECOMPUTE_KEYS = {
    "activation_checkpointing": ("partition_activations", "cpu_checkpointing", "number_checkpoints"),
    "pipeline": ("activation_checkpoint_interval",),
}

OFFLOAD_PARAM: dict[str, Rule] = {
    "device": Honoured(choice("none", "cpu", "nvme"), "refused"),
    "nvme_path": Honoured(PATH_TEXT, "refused"),
    "buffer_count": Honoured(whole(0)),
    "buffer_size": Honoured(whole(0)),
    "max_in_cpu": Honoured(whole(0)),
    "pin_memory": Honoured(FLAG),
}

OFFLOAD_OPTIMIZER: dict[str, Rule] = {
    "device": Honoured(choice("none", "cpu", "nvme"), "refused"),
    "nvme_path": Honoured(PATH_TEXT, "refused"),
    "buffer_count": Honoured(whole(0)),
    "ratio": Refused("a share on the device needs DeepSpeed's CPUAdam", "write 1.0", (1, 1.0)),
    **_flags("pin_memory pipeline_read pipeline_write fast_init"),
    "super_offload": Refused("SuperOffload is not measured under a pipeline", "leave it out", (False,)),
    "cpuadam_cores_perc": Refused("it belongs to super_offload", "leave it out", (0.8,)),
}

ZERO: dict[str, Rule] = {
    "stage": Honoured(choice(0, 1, 2, 3), "refused"),
    **_flags(
        "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions "
        "overlap_comm parameter_alignment ignore_unused_parameters "
        "memory_efficient_linear override_module_apply log_trace_cache_warnings "
        "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential"
    ),
    # They speak of save_16bit_model(), which is never called, and stand in most ZeRO-3 files.
    **_flags("stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save"),
    "reduce_bucket_size": Honoured(whole(1), "resolved"),
    "allgather_bucket_size": Honoured(_EVEN),
    # It would cut the optimizer's state up by another rule than the one that checkpoints are written by.
    "round_robin_gradients": Unused(
        FLAG,
        "it only spreads the copying of gradients under CPU offload over the ranks, and changes no number",
        (False,),
    ),
    "enable_sanity_checks": Refused("it compares ranks that hold different stages", "write false", (False,)),
    "sub_group_size": Honoured(whole(0)),
    "stage3_prefetch_bucket_size": Honoured(whole(0), "resolved"),
    "stage3_param_persistence_threshold": Honoured(whole(0), "resolved"),
    "stage3_model_persistence_threshold": Honoured(whole(0)),
    "stage3_max_live_parameters": Honoured(whole(0)),
    "stage3_max_reuse_distance": Honoured(whole(0)),
    "stage3_module_granularity_threshold": Refused(
        "gradients of modules that DeepSpeed gathers as one are not reduced once a step", "write 0", (0,)
    ),
    "offload_param": OFFLOAD_PARAM,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "compute_grad_norm": Refused("every step reports and clips by the gradient norm", "write true", (True,)),
    "cpu_offload": Refused("it is deprecated", "write offload_optimizer: {device: cpu}", (False,)),
    "cpu_offload_param": Refused("it is deprecated", "write offload_param: {device: cpu}", (False,)),
    "cpu_offload_use_pin_memory": Refused("it is deprecated", "write pin_memory in the offload section", (False,)),
    "elastic_checkpoint": Refused(_OWN_CHECKPOINTS, "leave it out", (False,)),
    "load_from_fp32_weights": Refused(_OWN_CHECKPOINTS, "leave it out", (True,)),
    "pipeline_loading_checkpoint": Refused(_OWN_CHECKPOINTS, "leave it out", (False,)),
    "legacy_stage1": Refused("DeepSpeed has no legacy stage 1 any more", "leave it out", (False,)),
    "zero_hpz_partition_size": Refused(_SECOND_COPY, "write 1", (0, 1)),
    "zero_quantized_weights": Refused(_ZERO_PP, "write false", (False,)),
    "zero_quantized_nontrainable_weights": Refused(_ZERO_PP, "write false", (False,)),
    "zero_quantized_gradients": Refused(_ZERO_PP, "write false", (False,)),
    "zeropp_loco_param": _removed("LoCo-ZeRO++"),
    "mics_shard_size": _removed("MiCS"),
    "mics_hierarchical_params_gather": _removed("MiCS"),
    "zenflow": Refused("ZenFlow is not measured under a pipeline", "leave it out"),
    "leaf_module": Refused("no module here is a mixture of experts", "leave it out", ({},)),
    "save_muon_momentum_buffer_in_memory": Refused(_NOT_ADAMW, "leave it out", (False,)),
}

FP16: dict[str, Rule] = {
    "enabled": Honoured(FLAG, "resolved"),
    "loss_scale": Honoured(NOT_NEGATIVE),
    "initial_scale_power": Honoured(whole(0, 62)),
    "loss_scale_window": Honoured(whole(1)),
    "hysteresis": Honoured(whole(1)),
    "consecutive_hysteresis": Honoured(FLAG),
    "min_loss_scale": Honoured(whole(1)),
    "auto_cast": Refused("a stage's input is fp16 already, or token ids", "write false", (False,)),
    "fp16_master_weights_and_grads": Refused("master weights are fp32", "write false", (False,)),
}

BF16: dict[str, Rule] = {
    "enabled": Honoured(FLAG, "resolved"),
    "check_grad_overflow": Refused(
        "a step whose gradient is not finite is skipped in every precision", "write true", (True,)
    ),
    "immediate_grad_update": Refused(
        "it belongs to BF16_Optimizer, whose norm is wrong under a pipeline", "write false", (False,)
    ),
    "bf16_master_weights_and_grads": Refused("master weights are fp32", "write false", (False,)),
    "bf16_optimizer_states": Refused("optimizer states are fp32", "write false", (False,)),
}

ADAM_PARAMS: dict[str, Rule] = {
    "lr": Honoured(POSITIVE, "resolved"),
    "betas": Honoured(BETAS, "resolved"),
    "eps": Honoured(POSITIVE, "resolved"),
    "weight_decay": Honoured(NOT_NEGATIVE, "resolved"),
    "adam_w_mode": Refused("Adam with L2 regularisation is not available", "write true, which is AdamW", (True,)),
    "bias_correction": Refused("AdamW corrects its bias here", "write true", (True,)),
    "amsgrad": Refused("AMSGrad is not available", "write false", (False,)),
    "torch_adam": Refused(_OWN_ADAMW, "leave it out", (True, False)),
    "set_grad_none": Refused("gradients are dropped between steps", "leave it out", (True,)),
    "fp32_optimizer_states": Refused("optimizer states are fp32", "leave it out", (True,)),
    "max_grad_norm": Refused("DeepSpeed takes it as gradient_clipping", "write gradient_clipping", (0,)),
}

_WARMUP: dict[str, Rule] = {
    "warmup_num_steps": Honoured(whole(1), "resolved"),
    "warmup_type": Honoured(choice("log", "linear")),
    "last_batch_iteration": Refused("a run resumes its own schedule", "leave it out", (-1,)),
}
_WARMUP_RATES: dict[str, Rule] = {
    "warmup_min_lr": Honoured(NOT_NEGATIVE, "resolved"),
    "warmup_max_lr": Honoured(POSITIVE, "resolved"),
}
_TOTAL: dict[str, Rule] = {"total_num_steps": Honoured(whole(1), "resolved")}

SCHEDULERS: dict[str, dict[str, Rule]] = {
    "WarmupLR": {**_WARMUP_RATES, **_WARMUP},
    "WarmupDecayLR": {**_TOTAL, **_WARMUP_RATES, **_WARMUP},
    "WarmupCosineLR": {
        **_TOTAL,
        **_WARMUP,
        "warmup_min_ratio": Honoured(number(0, most=1)),
        "cos_min_ratio": Honoured(number(0, most=1)),
    },
    "OneCycle": {
        "cycle_min_lr": Honoured(NOT_NEGATIVE, "refused"),
        "cycle_max_lr": Honoured(POSITIVE, "resolved"),
        "decay_lr_rate": Honoured(NOT_NEGATIVE),
        "cycle_first_step_size": Honoured(whole(1)),
        "cycle_second_step_size": Honoured(whole(0)),
        "cycle_first_stair_count": Honoured(whole(0)),
        "cycle_second_stair_count": Honoured(whole(0)),
        "decay_step_size": Honoured(whole(0)),
        "cycle_momentum": Honoured(FLAG),
        "cycle_min_mom": Honoured(number(0, most=1)),
        "cycle_max_mom": Honoured(number(0, most=1)),
        "decay_mom_rate": Honoured(NOT_NEGATIVE),
        "last_batch_iteration": _WARMUP["last_batch_iteration"],
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": Honoured(POSITIVE),
        "lr_range_test_step_size": Honoured(whole(1)),
        "lr_range_test_step_rate": Honoured(NOT_NEGATIVE),
        "lr_range_test_staircase": Honoured(FLAG),
        "last_batch_iteration": _WARMUP["last_batch_iteration"],
    },
}
REQUIRED_BY_SCHEDULER: dict[str, tuple[str, ...]] = {
    "WarmupDecayLR": ("total_num_steps",),
    "WarmupCosineLR": ("total_num_steps",),
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
}

_DATA_EFFICIENCY = _known(
    "enabled seed",
    data_sampling=_known(
        "enabled num_epochs num_workers pin_memory",
        curriculum_learning=_known("enabled data_cluster_path curriculum_metrics"),
        dynamic_batching=_known(
            "enabled metrics_path lr_scaling_method min_batch_size max_batch_size sequence_picking_order "
            "max_tokens verbose"
        ),
    ),
    data_routing=_known(
        "enabled",
        random_ltd=_known(
            "enabled total_layer_num random_ltd_layer_num random_ltd_layer_id model_mask_name model_type "
            "hidden_state_order random_ltd_schedule layer_token_lr_schedule"
        ),
    ),
)

_AUTOTUNING = _known(
    "enabled fast results_dir exps_dir overwrite metric metric_path start_profile_step end_profile_step "
    "tuner_type tuner_early_stopping tuner_num_trials arg_mappings max_train_batch_size "
    "min_train_batch_size max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu "
    "num_tuning_micro_batch_sizes mp_size model_info model_info_path"
)

_TENSOR_PARALLEL = _known(
    "autotp_size dtype tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend tp "
    "tensor_parallel injection_policy_tuple partition_config preset_model keep_module_on_host "
    "replace_with_kernel_inject kernel_inject"
)

_EXPERT_PARALLEL = _known(
    "enabled autoep_size expert_tensor_parallel_size validate_folding_routing async_split_plan "
    "preset_model moe_layer_pattern expert_pattern router_pattern use_grouped_mm "
    "disable_triton_grouped_mm route_norm route_scale score_apply combine_impl row_weighting_impl "
    "gate_up_impl comm_backend comm_num_sm comm_qp_margin comm_max_tokens_per_rank num_expert_groups "
    "num_limited_groups score_func top_k load_balance_coeff routed_scaling_factor expert_w1 expert_w2 "
    "expert_w3 num_experts_attr top_k_attr has_shared_experts shared_experts_pattern "
    "shared_experts_gate_pattern expert_activation"
)

_COMPILE = _known(
    "deepcompile autoep_non_moe free_activation free_activation_threshold offload_activation "
    "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log "
    "offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather "
    "keep_int_input_tensors keep_all_input_tensors passes"
)

TABLE: dict[str, Rule] = {
    # Batch sizes: stated once, in the run file.
    "train_batch_size": Derived(whole(1), "train.global_batch_size"),
    "train_micro_batch_size_per_gpu": Derived(whole(1), "train.micro_batch_size"),
    "gradient_accumulation_steps": Derived(
        whole(1), "train.global_batch_size/(train.micro_batch_size x data parallel)"
    ),
    "managed_gradient_accumulation": Refused("the pipeline counts its own microbatches", "write true", (True,)),
    "vocabulary_size": Derived(whole(1), "model.vocab_size"),
    # Optimizer and learning rate.
    "optimizer": ByType(
        {"AdamW": ADAM_PARAMS, "Adam": ADAM_PARAMS},
        others={"legacy_fusion": Refused("it belongs to the fp16 optimizer of stage 0", "write false", (False,))},
        refused={name: Refused(_ONE_BIT, "write 'AdamW'") for name in ("OneBitAdam", "ZeroOneAdam", "OneBitLamb")},
    ),
    "scheduler": ByType(SCHEDULERS, REQUIRED_BY_SCHEDULER),
    "gradient_clipping": Honoured(NOT_NEGATIVE),
    # Both speak of optimizers that DeepSpeed was not told of; megalite's AdamW is right under every stage and offload.
    "zero_allow_untested_optimizer": Refused(_OWN_ADAMW, "leave it out", (True, False)),
    "zero_force_ds_cpu_optimizer": Refused(_OWN_ADAMW, "leave it out", (True, False)),
    # Precision.
    "bf16": BF16,
    "fp16": FP16,
    "torch_autocast": Off(
        _ONE_PRECISION, "write bf16: {enabled: true}", _known("enabled dtype lower_precision_safe_modules")
    ),
    "data_types": {
        "grad_accum_dtype": Honoured(choice("fp32", "bf16", "fp16")),
        "param_dtype": Refused(_ONE_PRECISION, "leave it out"),
        "buffer_dtype": Refused("buffers keep their own precision", "leave it out"),
        "keep_in_fp32_modules": Refused("buffers keep their own precision", "leave it out", ([],)),
    },
    # Gradient reduction.
    "zero_optimization": ZERO,
    "communication_data_type": Honoured(choice("fp32", "bf16", "fp16")),
    "prescale_gradients": Honoured(FLAG),
    "gradient_predivide_factor": Honoured(POSITIVE),
    "gradient_allreduce_op": Refused("the loss is the mean over the global batch", "write 'mean'", ("mean",)),
    "disable_allgather": Refused("DeepSpeed reads it and does nothing with it", "leave it out", (False,)),
    "seq_parallel_communication_data_type": Refused(_ULYSSES, _ULYSSES_INSTEAD),
    # Storage of what is offloaded.
    "aio": {
        "block_size": Honoured(whole(1)),
        "queue_depth": Honoured(whole(1)),
        "intra_op_parallelism": Honoured(whole(1)),
        **_flags("single_submit overlap_events use_gds"),
        "thread_count": Refused("DeepSpeed 0.19 does not read it", "write intra_op_parallelism"),
    },
    # What DeepSpeed prints of itself.
    "steps_per_print": Honoured(_COUNT_OR_NEVER),
    "log_level": Honoured(choice("debug", "info", "warning", "error", "critical")),
    **_flags("wall_clock_breakdown memory_breakdown dump_state disable_python_gc"),
    "comms_logger": {**_flags("enabled verbose prof_all debug"), "prof_ops": Honoured(TEXTS)},
    # Both stand in LLaMA-Factory's files.
    "comms_config": {"verbose": Unused(FLAG, f"{_NOT_READ}; comms_logger has a verbose of its own", (False,))},
    "monitor_config": {
        "enabled": Unused(FLAG, f"{_NOT_READ}; read metrics.jsonl and tensorboard/ in run.dir", (False,)),
        "tag": Unused(TEXT, _NOT_READ, ("DeepSpeedMonitor",)),
        **{
            name: Off(f"{_NOT_READ} there", "read metrics.jsonl and tensorboard/ in run.dir", _known(keys))
            for name, keys in _MONITORS.items()
        },
    },
    "timers": {"throughput": _flags("enabled synchronized")},
    **{name: _monitor(keys) for name, keys in _MONITORS.items()},
    "flops_profiler": Off(
        "it counts one stage's modules as the whole model",
        "read mfu in metrics.jsonl",
        _known("enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"),
    ),
    # Memory.
    "activation_checkpointing": {
        "partition_activations": Honoured(FLAG),
        "cpu_checkpointing": Honoured(FLAG),
        "contiguous_memory_optimization": Refused(
            "torch's allocator reuses the memory of inputs of one size", "write false", (False,)
        ),
        "number_checkpoints": Honoured(whole(0)),
        "synchronize_checkpoint_boundary": Refused(
            "nothing needs to wait for the device there", "write false", (False,)
        ),
        "profile": Refused("forwards and backwards are timed by train.trace_steps", "write false", (False,)),
    },
    # Parallelism, which the run file states.
    "pipeline": {
        "stages": Derived(whole(1), "parallel.pipeline"),
        "partition": Refused("the run file partitions the layers", "write parallel.stage_layers", ("best", "uniform")),
        "seed_layers": Refused("a parameter starts from the seed and its name", "write false", (False,)),
        "activation_checkpoint_interval": Honoured(whole(0)),
        "use_reentrant": Refused("recomputation is torch's other form", "write false", (False,)),
        "pipe_partitioned": Refused("stages send whole activations", "write false", (False,)),
        "grad_partitioned": Refused("stages send whole gradients", "write false", (False,)),
    },
    "tensor_parallel": Off(
        "megalite shards its own layers", "write parallel.tensor", _TENSOR_PARALLEL, "autotp_size", (None, 0, 1)
    ),
    "sequence_parallel_size": Refused(_ULYSSES, _ULYSSES_INSTEAD, (1,)),
    "expert_parallel": Off("there is no mixture of experts", "leave it out", _EXPERT_PARALLEL),
    "use_data_before_expert_parallelism": Refused("there is no mixture of experts", "write false", (False,)),
    # What megalite does itself, or DeepSpeed no longer does.
    "checkpoint": {
        "tag_validation": Refused(_OWN_CHECKPOINTS, "leave it out", ("Warn", "WARN", "Ignore", "IGNORE")),
        "load_universal": Refused(_OWN_CHECKPOINTS, "write false", (False,)),
        "use_node_local_storage": Refused(_OWN_CHECKPOINTS, "write false", (False,)),
        "checkpoint_serialization": Refused(_OWN_CHECKPOINTS, "leave it out", (True,)),
        "parallel_write": {"pipeline_stage": Refused(_OWN_CHECKPOINTS, "write false", (False,))},
        "writer": Refused(_OWN_CHECKPOINTS, "leave it out"),
    },
    "datastates_ckpt": Refused(_OWN_CHECKPOINTS, "leave it out", (False,)),
    "dataloader_drop_last": Refused("every batch is whole", "leave it out", (False,)),
    "data_efficiency": Off("samples come in one order, of seed and step", "leave it out", _DATA_EFFICIENCY),
    "autotuning": Off("it would start runs of its own", "set batch sizes in the run file", _AUTOTUNING),
    "compile": Off("DeepCompile is not measured under a pipeline", "leave it out", _COMPILE, "deepcompile"),
    "hybrid_engine": Off(
        "nothing is generated while training",
        "leave it out",
        _known(
            "enabled max_out_tokens inference_tp_size release_inference_cache pin_parameters "
            "tp_gather_partition_size enable_cuda_graph"
        ),
    ),
    "weight_quantization": Refused("it is for inference", "leave it out", ({},)),
    "amp": Off(
        "DeepSpeed 0.19 has no Apex AMP any more",
        "write bf16: {enabled: true} or fp16: {enabled: true}",
        _known(
            "enabled opt_level cast_model_type patch_torch_functions keep_batchnorm_fp32 master_weights loss_scale "
            "cast_model_outputs num_losses verbosity min_loss_scale max_loss_scale"
        ),
    ),
    "compression_training": _removed("compression library"),
    "curriculum_learning": _removed("curriculum learning at the top level"),
    "eigenvalue": _removed("eigenvalue computation"),
    "elasticity": Off(
        "DeepSpeed 0.19 has no elastic training any more",
        "leave it out",
        _known(
            "enabled max_train_batch_size micro_batch_sizes min_gpus max_gpus min_time version prefer_larger_batch "
            "ignore_non_elastic_batch_info num_gpus_per_node model_parallel_size"
        ),
    ),
    "graph_harvesting": _removed("graph harvesting"),
    "nebula": _removed("Nebula checkpoints"),
    "progressive_layer_drop": _removed("progressive layer dropping"),
    "quantize_training": _removed("quantised training"),
    "sparse_attention": _removed("sparse attention"),
    "sparse_gradients": Refused("DeepSpeed 0.19 has no sparse gradients any more", "leave it out", (False,)),
}


# --------------------------------------------------------------------------------------------------------- reading


class _Reader:
    """Walks a document beside the table, keeps what is honoured or stated, and collects the faults and the notes."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.notes: list[Fault] = []

    def fault(self, key: Key, text: str) -> None:
        self.faults.append(Fault(key, text))

    def clean(self, *sections: str) -> bool:
        """No fault stands in these sections, so what they say together can be judged."""
        return not any(fault.key[0] in sections for fault in self.faults)

    def section(self, rules: Mapping[str, Any], data: object, at: Key) -> dict[str, Any]:
        """Return the section's honoured and stated keys, each in its own type."""
        if not isinstance(data, Mapping):
            self.fault(at, f"={show(data)} is not a section; write {{{_usable(rules)[0]}: ...}}")
            return {}
        kept: dict[str, Any] = {}
        for name, value in data.items():
            key = (*at, name)
            if name not in rules:
                self.fault(key, f" is not a key{_nearest_key(name, rules)}")
            elif value is not None and (read := self.value(rules[name], value, key)) is not None:
                kept[name] = read
        return kept

    def value(self, rule: Rule, value: Any, key: Key) -> Any:
        """Return what the document keeps of one value, None where that is nothing."""
        match rule:
            case Mapping():
                return self.section(rule, value, key) or None
            case ByType():
                return self.by_type(rule, value, key)
            case Off():
                return self.off(rule, value, key)
            case Refused():
                return self.refused(rule, value, key)
            case Unused():
                return self.unused(rule, value, key)
            case Honoured() if value == "auto":
                return self.auto(rule, key)
            case Derived() if value == "auto":
                return None
        try:
            return rule.kind.read(value)
        except ValueError as error:
            self.fault(key, str(error))
            return None

    def auto(self, rule: Honoured, key: Key) -> str | None:
        if rule.auto == "refused":
            self.fault(key, f"='auto' has nothing to follow; write {rule.kind.words}")
        return "auto" if rule.auto == "resolved" else None

    def refused(self, rule: Refused, value: Any, key: Key) -> None:
        if value not in (*rule.harmless, "auto"):
            shown = "" if isinstance(value, Mapping) else f"={show(value)}"
            self.fault(key, f"{shown} is refused: {rule.reason}; {rule.instead}")

    def unused(self, rule: Unused, value: Any, key: Key) -> None:
        try:
            read = value if value == "auto" else rule.kind.read(value)
        except ValueError as error:
            self.fault(key, str(error))
            return
        if read not in (*rule.quiet, "auto"):
            self.notes.append(Fault(key, f"={show(value)} is not used: {rule.reason}"))

    def off(self, rule: Off, value: Any, key: Key) -> None:
        if not isinstance(value, Mapping):
            self.refused(Refused(rule.reason, rule.instead, (False,)), value, key)
        elif self.known(rule.keys, value, key):
            self.refused(Refused(rule.reason, rule.instead, rule.off), value.get(rule.switch), (*key, rule.switch))

    def known(self, keys: Mapping[str, Any], data: Mapping[str, Any], at: Key) -> bool:
        """Check the names of a section that is left out, and of those within it."""
        before = len(self.faults)
        for name, value in data.items():
            if name not in keys:
                self.fault((*at, name), f" is not a key{nearest(name, keys)}")
            elif isinstance(keys[name], Mapping) and isinstance(value, Mapping):
                self.known(keys[name], value, (*at, name))
        return len(self.faults) == before

    def by_type(self, rule: ByType, value: Any, key: Key) -> dict[str, Any]:
        given = value.get("type") if isinstance(value, Mapping) else None
        name = {name.lower(): name for name in rule.params}.get(str(given).lower(), "")
        if isinstance(value, Mapping) and not name:
            refused = {name.lower(): why for name, why in rule.refused.items()}.get(str(given).lower())
            if refused is not None:
                self.refused(refused, given, (*key, "type"))
            else:
                words = " is missing; write " if given is None else f"={show(given)} is not "
                self.fault((*key, "type"), words + alternatives(rule.params))
            # Without a type no parameter can be judged.
            value = {other: item for other, item in value.items() if other not in ("type", "params")}
        rules = {"type": Honoured(TEXT), "params": rule.params.get(name, {}), **rule.others}
        kept = {"params": {}, **self.section(rules, value, key), "type": name}
        for parameter in rule.required.get(name, ()):
            if parameter not in (value.get("params") or {}):
                self.fault((*key, "params", parameter), _missing(rule.params[name][parameter]))
        return kept


def _missing(rule: Honoured) -> str:
    return f" is missing; write {rule.kind.words}" + (", or 'auto'" if rule.auto == "resolved" else "")


def _usable(rules: Mapping[str, Rule]) -> list[str]:
    return [name for name, rule in rules.items() if not isinstance(rule, Refused | Off | Unused)]


def _nearest_key(name: str, rules: Mapping[str, Rule]) -> str:
    close = nearest(name, rules)
    return close if close.startswith("; did you mean") else nearest(name, _usable(rules))


class Reading(NamedTuple):
    """What became of a JSON: the document in megalite's terms, what is wrong with it, and what the user should hear.

    A note is a `Fault` that ends nothing.
    """

    document: dict[str, Any]
    faults: list[Fault]
    notes: list[Fault]


_SECOND_NAMES = {
    name: f"stage3_{name}"
    for name in (
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "gather_16bit_weights_on_model_save",
        "module_granularity_threshold",
        "use_all_reduce_for_fetch_params",
        "allgather_sequential",
    )
}
"""Names of ZeRO's keys that DeepSpeed takes as well, with those that it documents."""


def read_document(data: Mapping[str, Any], precision: Precision | None = None, run_file: str = "run.yaml") -> Reading:
    """Return the JSON in megalite's terms, every fault in it, and what of it is taken otherwise than it is written.

    The document keeps the honoured and stated keys only. `precision` is ``train.precision`` of `run_file`, None where
    that is not given: ``enabled: auto`` of bf16 and fp16 follows it, and a stated ``enabled`` must agree. Where nothing
    but "auto" asks, it is bf16, or fp16 where bf16 is ruled out. "auto" stays where `resolve_auto` computes it.
    """
    reader = _Reader()
    data = dict(data)
    if "bfloat16" in data:
        if "bf16" in data:
            reader.fault(("bfloat16",), " stands beside bf16, its newer name; keep bf16")
        data.setdefault("bf16", data.pop("bfloat16"))
    data = _first_names(data, reader)
    document = reader.section(TABLE, data, ())
    if reader.clean("bf16", "fp16"):
        reader.faults.extend(_precision_faults(document, precision, run_file))
    if reader.clean("bf16", "fp16"):
        chosen = _choose_precision(document, precision, reader)
        if chosen != "fp32" and reader.clean("zero_optimization"):
            _leave_stage_0(document, chosen, reader)
        if reader.clean("data_types"):
            reader.faults.extend(_accumulation_faults(document, chosen))
    if reader.clean("zero_optimization"):
        reader.faults.extend(_zero_faults(document))
    if reader.clean("activation_checkpointing", "pipeline"):
        reader.faults.extend(_recompute_faults(document))
    return Reading(_normalised(document), reader.faults, reader.notes)


def _first_names(data: dict[str, Any], reader: _Reader) -> dict[str, Any]:
    """Return the JSON with ZeRO's keys under the names that DeepSpeed documents."""
    zero = data.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return data
    renamed: dict[str, Any] = {}
    for name, value in zero.items():
        first = _SECOND_NAMES.get(name) or name
        if first != name and first in zero:
            reader.fault(("zero_optimization", name), f" stands beside {first}, another name for it; keep {first}")
        else:
            renamed[first] = value
    return {**data, "zero_optimization": renamed}


def _precision_faults(document: Mapping[str, Any], precision: Precision | None, run_file: str) -> Iterator[Fault]:
    enabled = {name: document.get(name, {}).get("enabled") for name in ("bf16", "fp16")}
    if enabled["bf16"] is True and enabled["fp16"] is True:
        yield Fault(("fp16", "enabled"), "=true stands beside bf16.enabled=true; keep one of them")
    elif precision is not None:
        for name, value in enabled.items():
            if isinstance(value, bool) and value != (name == precision) and (value or name == precision):
                text = f"={show(value)} disagrees with train.precision={show(precision)} of {run_file}"
                yield Fault((name, "enabled"), f"{text}; write 'auto' or {show(not value)} here, or change the other")


def _choose_precision(document: dict[str, Any], precision: Precision | None, reader: _Reader) -> Precision:
    """Write the run's precision out in the document, in the place of "auto", and return it."""
    switches: tuple[Precision, Precision] = ("bf16", "fp16")
    enabled: dict[Precision, Any] = {name: document.get(name, {}).get("enabled") for name in switches}
    chosen: Precision | None = precision or next((name for name, value in enabled.items() if value is True), None)
    if chosen is None:
        asking = [name for name, value in enabled.items() if value == "auto"]
        chosen = "fp32"
        if asking:
            chosen = "fp16" if enabled["bf16"] is False else "bf16"
            text = f"='auto' is taken for {chosen}, since train.precision is not given; write fp32, bf16 or fp16 there"
            reader.notes.append(Fault((asking[0], "enabled"), text))
    for name in enabled:
        if name == chosen:
            document.setdefault(name, {})["enabled"] = True
        elif enabled[name] == "auto":
            del document[name]["enabled"]
            if not document[name]:
                del document[name]
    return chosen


def _leave_stage_0(document: dict[str, Any], precision: Precision, reader: _Reader) -> None:
    """Have stage 1 in the place of stage 0, and say so.

    At stage 0 DeepSpeed has no optimizer with fp32 master weights that reduces gradients once a step and takes their
    norm over a pipeline. Stage 1 is the same training: it only divides the optimizer's state among the replicas.
    """
    zero = document.get("zero_optimization", {})
    if zero.get("stage", 0) == 0:
        was = "=0" if "stage" in zero else " is not given, which is stage 0, and"
        document["zero_optimization"] = {**zero, "stage": 1}
        text = f"{was} runs as stage 1: in {precision} the fp32 master weights are ZeRO's. The training is the same; "
        text += "the replicas share the optimizer's state"
        reader.notes.append(Fault(("zero_optimization", "stage"), text))


def _accumulation_faults(document: Mapping[str, Any], precision: Precision) -> Iterator[Fault]:
    stated = document.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if stated not in ("fp32", precision):
        allowed = alternatives(dict.fromkeys(("fp32", precision)))
        text = f"='{stated}' does not go with parameters in {precision}; write {allowed}"
        yield Fault(("data_types", "grad_accum_dtype"), text)


def _zero_faults(document: Mapping[str, Any]) -> Iterator[Fault]:
    zero = document.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    for name, cpu_stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        if name in zero:
            for fault in _offload_faults(zero[name], stage, cpu_stages):
                yield Fault(("zero_optimization", name, *fault.key), fault.text)
    for name, off in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if stage > 0 and document.get(name, off) != off:
            text = f"={show(document[name])} is not taken by DeepSpeed at ZeRO stage {stage}; write {show(off)}"
            yield Fault((name,), text)


def _recompute_faults(document: Mapping[str, Any]) -> Iterator[Fault]:
    number = document.get("activation_checkpointing", {}).get("number_checkpoints")
    interval = document.get("pipeline", {}).get("activation_checkpoint_interval")
    if number and interval:
        text = f"={interval} stands beside activation_checkpointing.number_checkpoints={number}; keep one of them"
        yield Fault(("pipeline", "activation_checkpoint_interval"), text)


def _offload_faults(offload: Mapping[str, Any], stage: int, cpu_stages: tuple[int, ...]) -> Iterator[Fault]:
    device = offload.get("device")
    stages = (3,) if device == "nvme" else cpu_stages
    if device is None:
        # DeepSpeed takes a missing device for 'none', and trains without the offload that was asked for.
        yield Fault(("device",), " is missing; write 'cpu', 'nvme' or 'none'")
    elif device != "none" and stage not in stages:
        yield Fault(
            ("device",), f"={show(device)} does not go with ZeRO stage {stage}; use stage {alternatives(stages)}"
        )
    if device == "nvme" and "nvme_path" not in offload:
        yield Fault(("nvme_path",), " is missing; write the folder on the NVMe device")


def _normalised(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document without what asks for nothing."""
    zero = document.get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name, {}).get("device") == "none":
            del zero[name]
    for name, keys in RECOMPUTE_KEYS.items():
        for key in keys:
            if not document.get(name, {}).get(key, True):
                del document[name][key]
        if document.get(name) == {}:
            del document[name]
    if optimizer := document.get("optimizer"):
        document["optimizer"] = {"type": "AdamW", "params": optimizer["params"]}
    return document


# ------------------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True, slots=True)
class AdamW:
    """AdamW's settings (arXiv 1711.05101), with megalite's defaults: what an "auto" stands for."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def plain(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return asdict(self) | {"betas": list(self.betas)}


DEEPSPEED_ADAMW = AdamW(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
"""What DeepSpeed takes for the parameters that a JSON's optimizer section leaves out."""


@dataclass(frozen=True, slots=True)
class DeepSpeedSettings:
    """What the DeepSpeed JSON says, checked; made by `parse`."""

    document: Mapping[str, Any] = field(default_factory=dict)
    """Honoured and stated keys, in plain JSON; an empty document is fp32 at ZeRO stage 0."""
    origin: Origin = Origin(section=("deepspeed",))
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What of the JSON is taken otherwise than it is written, or not at all; a line each, for the user."""

    @classmethod
    def parse(
        cls,
        data: Mapping[str, Any],
        origin: Origin = Origin(section=("deepspeed",)),
        precision: Precision | None = None,
    ) -> "DeepSpeedSettings":
        """Check a JSON against the table, and against ``train.precision``; raise UserError, a line for each fault."""
        document, faults, notes = read_document(data, precision)
        report([origin.line(fault) for fault in faults])
        return cls(document, origin, tuple(map(origin.line, notes)))

    @property
    def precision(self) -> Precision:
        """The dtype of the model's parameters and activations."""
        for name in ("bf16", "fp16"):
            if self.document.get(name, {}).get("enabled"):
                return name
        return "fp32"

    @property
    def gradient_precision(self) -> Precision:
        """The dtype in which the gradients of a step are added up; fp32 unless the JSON asks for less memory."""
        return self.document.get("data_types", {}).get("grad_accum_dtype", "fp32")

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self.document.get("zero_optimization", {}).get("stage", 0)

    @property
    def recompute(self) -> dict[str, int]:
        """What the JSON asks of recomputed activations, by dotted key; empty where it asks for nothing."""
        return {
            f"{name}.{key}": self.document[name][key]
            for name, keys in RECOMPUTE_KEYS.items()
            for key in keys
            if key in self.document.get(name, {})
        }

    @property
    def on_nvme(self) -> tuple[str, ...]:
        """The sections of ``zero_optimization`` whose tensors lie on an NVMe device."""
        zero = self.document.get("zero_optimization", {})
        return tuple(s for s in ("offload_optimizer", "offload_param") if zero.get(s, {}).get("device") == "nvme")

    @property
    def asks_deepspeed_to_report(self) -> bool:
        """Whether a key asks DeepSpeed for words of its own, which is silent otherwise."""
        asked = ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state")
        sections = (self.document.get("comms_logger", {}), self.document.get("timers", {}).get("throughput", {}))
        return any(self.document.get(key) for key in asked) or any(section.get("enabled") for section in sections)

    @property
    def gradient_clipping(self) -> float:
        """The largest global gradient norm; 0 means no clipping. DeepSpeed clips at 1.0 unless told otherwise."""
        return self.document.get("gradient_clipping", 1.0)

    @property
    def optimizer(self) -> AdamW | None:
        """AdamW's settings where the JSON has an ``optimizer`` section."""
        return self.optimizer_with({})

    def optimizer_with(self, stated: Mapping[str, Any]) -> AdamW | None:
        """Return AdamW's settings where the JSON has an ``optimizer`` section; what it leaves open is as `stated`.

        What neither states is megalite's default where the JSON says "auto", and DeepSpeed's where it says nothing.
        """
        if (section := self.document.get("optimizer")) is None:
            return None
        given = {name: value for name, value in section["params"].items() if value != "auto"}
        auto = {name: value for name, value in AdamW().plain().items() if section["params"].get(name) == "auto"}
        params = DEEPSPEED_ADAMW.plain() | auto | dict(stated) | given
        return AdamW(params["lr"], tuple(params["betas"]), params["eps"], params["weight_decay"])

    def optimizer_disagreements(self, stated: Mapping[str, Any]) -> Iterator[str]:
        """Find the parameters of the JSON's optimizer that are other than `stated`."""
        params = self.document.get("optimizer", {}).get("params", {})
        for name, value in stated.items():
            theirs = params.get(name, "auto")
            if theirs != "auto" and theirs != (list(value) if isinstance(value, tuple) else value):
                yield name

    @property
    def scheduler(self) -> dict[str, Any] | None:
        """DeepSpeed's learning-rate scheduler: ``{"type": ..., "params": {...}}``."""
        return copy.deepcopy(self.document.get("scheduler"))

    def resolve_auto(
        self,
        *,
        hidden_size: int,
        steps: int,
        lr: float,
        optimizer: Mapping[str, Any] | None = None,
        warmup_steps: int | None = None,
    ) -> "DeepSpeedSettings":
        """Return the settings with the remaining "auto" values replaced.

        Bucket sizes follow the hidden size as they do in transformers; the scheduler follows the run's steps, its
        learning rate and its warm-up; the optimizer what the run file states of it. `warmup_steps` None: the run file
        states none. DeepSpeed warms up for at least one step, so that a warm-up of 0 is written as 1.
        """
        document = copy.deepcopy(dict(self.document))
        area = hidden_size * hidden_size
        buckets = {
            "reduce_bucket_size": area,
            "stage3_prefetch_bucket_size": area * 9 // 10,
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        _fill(document.get("zero_optimization", {}), buckets)
        if adamw := self.optimizer_with(optimizer or {}):
            document["optimizer"] = {"type": "AdamW", "params": document["optimizer"]["params"] | adamw.plain()}
        params = document.get("scheduler", {}).get("params", {})
        if warmup_steps is not None and self.warms_up:
            params.setdefault("warmup_num_steps", "auto")
        rates = {"warmup_min_lr": 0.0, "warmup_max_lr": lr, "cycle_max_lr": lr, "total_num_steps": steps}
        _fill(params, {**rates, "warmup_num_steps": max(1, warmup_steps or 0)})
        return replace(self, document=document)

    @property
    def warms_up(self) -> bool:
        """Whether the JSON's scheduler has a warm-up of so many steps."""
        return "warmup_num_steps" in SCHEDULERS.get(self.document.get("scheduler", {}).get("type", ""), {})

    def disagreements(self, values: Mapping[str, int | None], run_file: str) -> Iterator[Fault]:
        """Find stated values that are not the run file's; `values` holds them by `Derived.follows`."""
        for key, rule in _derived(TABLE):
            stated = self.document
            for name in key[:-1]:
                stated = stated.get(name, {})
            value, expected = stated.get(key[-1]), values.get(rule.follows)
            if value is not None and expected is not None and value != expected:
                text = f"={value} disagrees with {rule.follows}={expected} of {run_file}; write 'auto' or {expected}"
                yield Fault(key, text)

    def without_derived(self) -> Self:
        """Return the JSON without what restates the run file."""
        document = copy.deepcopy(dict(self.document))
        for key, _ in _derived(TABLE):
            section = document
            for name in key[:-1]:
                section = section.get(name, {})
            section.pop(key[-1], None)
        return replace(self, document=document)

    def spelled(self) -> dict[str, Any]:
        """Return the JSON as it is written into a file: a path reads back as it is."""
        document = copy.deepcopy(dict(self.document))
        for section in document.get("zero_optimization", {}).values():
            if isinstance(section, dict) and "nvme_path" in section:
                section["nvme_path"] = spell(section["nvme_path"])
        return document

    def engine_config(self, micro_batch_size: int, gradient_accumulation_steps: int) -> dict[str, Any]:
        """Return the JSON for ``deepspeed.initialize``, without the optimizer, which megalite builds itself."""
        config = copy.deepcopy(dict(self.document))
        engines_not = ("optimizer", "pipeline", "activation_checkpointing", "data_types")
        for name in (*engines_not, "vocabulary_size", "train_batch_size"):
            config.pop(name, None)
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
        config["gradient_accumulation_steps"] = gradient_accumulation_steps
        config["gradient_clipping"] = self.gradient_clipping
        return config


def _fill(section: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if section.get(name) == "auto":
            section[name] = value


def _derived(rules: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Derived]]:
    for name, rule in rules.items():
        if isinstance(rule, Derived):
            yield (*at, name), rule
        elif isinstance(rule, Mapping):
            yield from _derived(rule, (*at, name))


# ----------------------------------------------------------------------------------------------------------- files


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's mapping.

    Raises UserError where the file is missing or is no JSON object, and where a key stands twice, of which DeepSpeed
    and Python's json would keep the last in silence.
    """
    try:
        document = json.loads(read_text(path), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{path.name}: line {error.lineno}, column {error.colno}: no JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{path.name}: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path.name}: the file holds {show(document)}; write a JSON object")
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for name, value in pairs:
        if name in section:
            raise ValueError(f"{name} stands twice in one section; keep one")
        section[name] = value
    return section
