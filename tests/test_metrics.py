"""What a run says of itself."""

import io
import json
from pathlib import Path

import psutil
import torch

from megalite.config import GPT2Config, GPTNeoXConfig, LlamaConfig
from megalite.metrics import MetricsLog, StepMetrics, device_peak, flops_per_token, peak_memory
from megalite.model.stage import Stage
from megalite.tensor_parallel.collectives import TensorGroup

SHAPE = {
    "vocab_size": 640,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
}


def test_flops_are_six_for_every_weight_that_multiplies_and_attention() -> None:
    for config in (
        LlamaConfig.model_validate({"architecture": "llama", "num_key_value_heads": 2, **SHAPE}),
        LlamaConfig.model_validate({"architecture": "llama", "qk_norm": True, **SHAPE}),
        GPTNeoXConfig.model_validate({"architecture": "gpt_neox", **SHAPE}),
        GPT2Config.model_validate({"architecture": "gpt2", "tie_word_embeddings": False, **SHAPE}),
    ):
        stage = Stage(config, range(3), index=0, num_stages=1, group=TensorGroup())
        products = sum(
            parameter.numel()
            for name, parameter in stage.named_parameters()
            if parameter.ndim == 2 and not name.startswith("embedding")
        )
        assert flops_per_token(config, 32) == 6 * products + 12 * 3 * 64 * 32


def test_a_step_is_one_line_on_the_console_and_one_in_the_file(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = MetricsLog(tmp_path, total_steps=200, world_size=4, stream=stream)
    step = StepMetrics(
        step=7,
        loss=5.25,
        learning_rate=1e-3,
        grad_norm=0.5,
        loss_scale=None,
        skipped=False,
        tokens=7168,
        tokens_per_second=2048.0,
        step_seconds=0.5,
        mfu=0.25,
        memory_bytes=3 << 29,
        data_wait=0.25,
    )
    log.step(step)
    log.evaluation(7, "valid", 5.5)
    log.evaluation(7, "web", 5.25)
    log.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step   7/200 | loss 5.2500 | lr 1.00e-03 | grad 0.500 | tok/s 2,048 | tok/s/rank 512 | MFU 25.0%"
        " | mem 1.50 GiB | ETA 1:36",
        "step   7/200 | valid loss 5.5000",
        "step   7/200 | valid loss on web 5.2500",
    ]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == 5.25
    assert list(records[0]) == [
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "loss_scale",
        "skipped",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "mfu",
        "memory_bytes",
        "data_wait",
    ]
    assert records[1] == {"step": 7, "valid_set": "valid", "valid_loss": 5.5}
    assert records[2] == {"step": 7, "valid_set": "web", "valid_loss": 5.25}
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_peak_on_a_cpu_is_measured_and_named_so() -> None:
    flops, source = device_peak(torch.device("cpu"), torch.float32)
    assert flops > 1e8
    assert source == "measured matrix products"


def test_memory_is_that_of_this_process() -> None:
    held = torch.ones(100 << 18)
    resident = psutil.Process().memory_info().rss
    assert resident >= 4 * held.numel()
    assert 0.95 * resident < peak_memory(torch.device("cpu")) < psutil.virtual_memory().total
