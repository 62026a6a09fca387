"""What a run says of itself."""

import io
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megalite.errors import UserError
from megalite.model.families.gpt2.config import GPT2Config
from megalite.model.families.gpt_neox.config import GPTNeoXConfig
from megalite.model.families.llama.config import LlamaConfig
from megalite.model.stage import Stage
from megalite.model.structure import flops_per_token
from megalite.monitoring.device import device_peak, peak_memory
from megalite.monitoring.metrics import WIDTH, MetricsLog, StepMetrics
from megalite.parallel.tensor_group import TensorGroup

SHAPE = {
    "vocab_size": 640,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
}


def test_a_full_disk_is_told_without_a_promise(tmp_path: Path) -> None:
    """Whether there is a checkpoint to go on from is not known where the metrics are written."""
    log = MetricsLog(tmp_path, total_steps=4, world_size=1, stream=io.StringIO())
    with Path("/dev/full").open("ab", buffering=0) as log._file, pytest.raises(UserError) as raised:
        log.restart(2, 1)
    assert "metrics.jsonl: cannot be written: " in str(raised.value)
    assert "free disk space" in str(raised.value)
    assert "checkpoint" not in str(raised.value)


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


def metrics(step: int = 7, **given: Any) -> StepMetrics:
    usual: dict[str, Any] = {
        "loss": 5.25,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "loss_scale": None,
        "skipped": False,
        "tokens": 7168,
        "tokens_per_second": 2048.0,
        "step_seconds": 0.5,
        "mfu": 0.25,
        "memory_bytes": 3 << 29,
        "data_wait": 0.25,
    }
    return StepMetrics(step, **{**usual, **given})


def test_a_step_is_one_line_on_the_console_and_one_in_the_file(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = MetricsLog(tmp_path, total_steps=200, world_size=4, stream=stream)
    began = time.time()
    log.step(metrics())
    log.evaluation(7, "valid", 5.5)
    log.evaluation(7, "web", 5.25)
    log.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step   7/200 | loss 5.2500 | lr 1.00e-03 | grad 0.500 | 2,048 tok/s | MFU 25.0% | ETA 1:36",
        "step   7/200 | peak memory 1.50 GiB, of the rank that has most",
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
        "time",
    ]
    times = [record.pop("time") for record in records]
    assert began <= times[0] <= times[1] <= times[2] <= time.time()
    valid, web = math.exp(5.5), math.exp(5.25)
    assert records[1] == {"step": 7, "valid_set": "valid", "valid_loss": 5.5, "valid_perplexity": valid}
    assert records[2] == {"step": 7, "valid_set": "web", "valid_loss": 5.25, "valid_perplexity": web}
    assert list((tmp_path / "tensorboard").iterdir())


def shown(tmp_path: Path, steps: Sequence[StepMetrics], **given: Any) -> list[str]:
    stream = io.StringIO()
    log = MetricsLog(tmp_path, **{"total_steps": 200, "world_size": 4, **given}, stream=stream)
    for step in steps:
        log.step(step)
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(steps)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("total", [9, 200, 100_000, 10_000_000])
@pytest.mark.parametrize("loss", [0.0012, 11.25, 123456.5, math.nan])
@pytest.mark.parametrize("rate", [0.4, 918.0, 987_654.0, 123_456_789.0])
@pytest.mark.parametrize("seconds", [0.01, 3.0, 4000.0])
@pytest.mark.parametrize("skipped", [False, True])
def test_the_line_of_a_step_fits_a_hundred_columns(
    total: int, loss: float, rate: float, seconds: float, skipped: bool
) -> None:
    log = MetricsLog.__new__(MetricsLog)
    log._total, log._steps, log._seconds = total, 1, 0.0
    norm = math.inf if skipped else 1234.5678
    m = metrics(
        total // 2, loss=loss, tokens_per_second=rate, step_seconds=seconds, skipped=skipped, grad_norm=norm, mfu=1.234
    )
    line = log._line(m)
    assert len(line) <= WIDTH, line
    assert line.startswith(f"step {total // 2:>{len(str(total))}}/{total} | loss {loss:.4f} | ")
    assert f" | grad {norm:.3f} | " in line
    assert " tok/s" in line
    assert (" | skipped | " in line) == skipped
    if total <= 200 and not skipped:
        assert " | lr 1.00e-03 | " in line
        assert " | ETA " in line


@pytest.mark.parametrize(
    ("log_every", "last", "expected"),
    [(1, 12, list(range(3, 13))), (5, 12, [3, 5, 8, 10, 12]), (100, 12, [3, 8, 12]), (4, None, [3, 4, 8, 12])],
)
def test_the_console_shows_every_nth_step(
    tmp_path: Path, log_every: int, last: int | None, expected: list[int]
) -> None:
    """And the first, the last and those that were skipped, as step 8 is."""
    steps = [metrics(step, skipped=step == 8) for step in range(3, 13)]
    lines = shown(tmp_path, steps, log_every=log_every, last=last, after=2)
    assert [int(line.split("/")[0].removeprefix("step")) for line in lines if " | loss " in line] == expected


def test_memory_and_loss_scale_are_told_when_they_change(tmp_path: Path) -> None:
    scales = [65536.0, 65536.0, 32768.0, 32768.0, 0.5]
    sizes = [100, 105, 109, 111, 123]
    steps = [
        metrics(step, loss_scale=scale, memory_bytes=size << 28)
        for step, (scale, size) in enumerate(zip(scales, sizes, strict=True), 1)
    ]
    told = [line for line in shown(tmp_path, steps, world_size=1) if " | loss " not in line or "scale" in line]
    assert told == [
        "step   1/200 | peak memory 25.00 GiB",
        "step   1/200 | loss scale 65536",
        "step   3/200 | loss scale 32768",
        "step   4/200 | peak memory 27.75 GiB",
        "step   5/200 | peak memory 30.75 GiB",
        "step   5/200 | loss scale 0.5",
    ]


def test_throughput_leaves_the_first_steps_out(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, total_steps=200, world_size=4, stream=io.StringIO())
    for step, (rate, seconds) in enumerate([(1.0, 900.0), (2.0, 90.0)], 1):
        log.step(metrics(step, tokens_per_second=rate, step_seconds=seconds))
    assert log.throughput() is None
    for step, (rate, seconds) in enumerate([(3000.0, 1.0), (1000.0, 3.0)], 3):
        log.step(metrics(step, tokens_per_second=rate, step_seconds=seconds))
    assert log.throughput() == "throughput: 1,500 tok/s, 375 tok/s/rank"
    log.close()


def test_tensorboard_has_the_configuration_and_perplexity(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, total_steps=200, world_size=4, stream=io.StringIO())
    log.configuration("run:\n  dir: runs/x\n", {"train.steps": 200, "model.architecture": "llama", "a": 0.5, "b": True})
    log.step(metrics())
    log.evaluation(7, "valid", 2.0)
    log.evaluation(7, "web", 1e4)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"valid/loss", "valid/perplexity", "valid_web/perplexity", "train/loss"} <= set(tags["scalars"])
    assert events.Scalars("valid/perplexity")[0].value == pytest.approx(math.exp(2.0))
    assert events.Scalars("valid_web/perplexity")[0].value == math.inf
    assert (
        events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0] == b"    run:\n      dir: runs/x\n"
    )
    assert b"train.steps" in events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["valid_perplexity"] is None


def test_the_peak_on_a_cpu_is_measured_and_named_so() -> None:
    flops, source = device_peak(torch.device("cpu"), torch.float32)
    assert flops > 1e8
    assert source == "measured matrix products"


def test_memory_is_that_of_this_process() -> None:
    held = torch.ones(100 << 18)
    resident = psutil.Process().memory_info().rss
    assert resident >= 4 * held.numel()
    assert 0.95 * resident < peak_memory(torch.device("cpu")) < psutil.virtual_memory().total
