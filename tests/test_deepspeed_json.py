"""DeepSpeed's JSON: the table against DeepSpeed itself, and the exact words for everything that is refused."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megalite.deepspeed_json import (
    ADAM_PARAMS,
    BF16,
    DEEPSPEED_ADAMW,
    FP16,
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAM,
    REQUIRED_BY_SCHEDULER,
    SCHEDULERS,
    TABLE,
    ZERO,
    AdamW,
    DeepSpeedSettings,
    Honoured,
    Off,
    read_document,
    read_json,
)
from megalite.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs" / "deepspeed"
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
    document, faults = read_document(HUGGING_FACE)
    assert faults == []
    assert read_document(document) == (document, [])


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
        {"bf16": {"enabled": "auto"}},
        "bf16.enabled='auto' has nothing to follow, since precision is stated here alone; write true or false",
    ),
    (
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        "torch_autocast.enabled=true is refused: bf16 and fp16 state the precision, and nothing else does; "
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
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}},
        "scheduler.params.warmup_num_steps='auto' has nothing to follow; write an integer of at least 1",
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
    (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        "zero_optimization.round_robin_gradients=true is refused: it cuts the optimizer's state up by another rule "
        "than the one that checkpoints are written by; write false",
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


def test_both_precisions_left_to_auto_are_told() -> None:
    with pytest.raises(UserError) as raised:
        parse({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}})
    assert [line.split("=")[0] for line in str(raised.value).splitlines()] == [
        "run.yaml: deepspeed.bf16.enabled",
        "run.yaml: deepspeed.fp16.enabled",
    ]


def test_faults_do_not_breed_faults() -> None:
    """A stage that cannot be read says nothing of whether the offload goes with it."""
    with pytest.raises(UserError) as raised:
        parse(zero(7, offload_param={"device": "cpu"}))
    assert str(raised.value) == "run.yaml: deepspeed.zero_optimization.stage=7 is not 0, 1, 2 or 3"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"fp16": {"enabled": true, "enabled": false}}', "ds.json: enabled stands twice in one section; keep one"),
        ('{"steps_per_print": Infinity}', "ds.json: Infinity is no JSON; write a finite number"),
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


def test_the_table_has_every_key_that_deepspeed_reads(deepspeed: Any) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()
    DeepSpeedConfig(Asked({"train_batch_size": 1}, asked))
    assert {"gradient_clipping", "zero_optimization", "comms_logger"} <= asked  # the spy sees what it should
    assert asked - {"bfloat16"} <= TABLE.keys()


def fields(model: Any) -> set[str]:
    """The JSON names of a DeepSpeed section."""
    return {info.alias or name for name, info in model.model_fields.items()}


def test_the_sections_have_every_field_of_deepspeeds(deepspeed: Any) -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import (
        _REMOVED_TOP_LEVEL_CONFIG_KEYS,
        _REMOVED_ZERO_CONFIG_KEYS,
        HybridEngineConfig,
    )
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
        (TABLE["tensor_parallel"], fields(TPTrainingConfig)),
        (TABLE, set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)),
    ]
    for ours, theirs in ours_and_theirs:
        names = set(ours.keys) if isinstance(ours, Off) else set(ours)  # type: ignore[arg-type]
        assert theirs - names == set()
        assert names - theirs == set() or ours is TABLE or ours is TABLE["tensor_parallel"]


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
    from megalite.deepspeed_table import deepspeed_table

    page = Path(__file__).parents[1] / "docs" / "deepspeed_json.md"
    hint = "make it anew: python -m megalite.deepspeed_table > docs/deepspeed_json.md"
    assert page.read_text(encoding="utf-8") == deepspeed_table(), hint


def test_the_page_has_every_key() -> None:
    from megalite.deepspeed_table import deepspeed_table

    page = deepspeed_table()
    assert all(f"| `{key}" in page for key in TABLE)
    assert all(f"| `zero_optimization.{key}" in page for key in ZERO)
