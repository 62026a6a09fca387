"""Every section and key that DeepSpeed 0.19.8 documents or reads, and the rule for each."""

import math
from typing import Any

from megalite.config.deepspeed.rules import PRECISION_NAMES, ByType, Derived, Honoured, Off, Refused, Rule, Unused
from megalite.settings.values import (
    BETAS,
    FLAG,
    NOT_NEGATIVE,
    PATH_TEXT,
    POSITIVE,
    TEXT,
    TEXTS,
    Kind,
    choice,
    number,
    whole,
)


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

LION_PARAMS: dict[str, Rule] = {name: ADAM_PARAMS[name] for name in ("lr", "betas", "weight_decay", "set_grad_none")}

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
        {"AdamW": ADAM_PARAMS, "Adam": ADAM_PARAMS, "Lion": LION_PARAMS},
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
        "grad_accum_dtype": Honoured(choice("fp32", "bf16", "fp16", other_names=PRECISION_NAMES)),
        "param_dtype": Refused(_ONE_PRECISION, "leave it out"),
        "buffer_dtype": Refused("buffers keep their own precision", "leave it out"),
        "keep_in_fp32_modules": Refused("buffers keep their own precision", "leave it out", ([],)),
    },
    # Gradient reduction.
    "zero_optimization": ZERO,
    "communication_data_type": Honoured(choice("fp32", "bf16", "fp16", other_names=PRECISION_NAMES)),
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
