"""A whole run by the command line: what it prints and leaves behind."""

import json
import time
from pathlib import Path

import pytest
import yaml
from commands import TINY, megalite
from harness import run_distributed
from training import build_trainer

from megalite.data.collate import SampleMicrobatch


def test_a_run_leaves_its_metrics_its_pictures_and_done(run_file: Path, tmp_path: Path) -> None:
    overrides = [*TINY, "parallel.tensor=2", "parallel.pipeline=2", "train.steps=6", "train.trace_steps=[4]"]
    done = megalite("train", str(run_file), *overrides, "train.eval_every=3", "train.eval_batches=2", fresh=True)
    lines = done.stdout.splitlines()
    directory = tmp_path / "run"
    assert [line for line in lines if line.startswith("step 2/6 | loss ")]
    assert lines[-1] == f"run: {directory}"
    assert any(line.startswith("validation loss: ") for line in lines)
    assert [line for line in done.stderr.splitlines() if not line.startswith("megalite: ")] == []  # how it starts

    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["tokens"] == 6 * 4 * 24
    assert [record["step"] for record in records if "valid_loss" in record] == [3, 6]
    assert json.loads((directory / "DONE.json").read_text()) == {"step": 6, "tokens": 6 * 4 * 24}
    timeline = json.loads((directory / "timeline_step_4.json").read_text())
    assert len(timeline["spans"]) == 2 * 2 * 4  # a forward and a backward of 4 microbatches on 2 stages
    for picture in ("loss.png", "timeline_step_4.png"):
        assert (directory / picture).read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((directory / "config.yaml").read_text())["parallel"]["data"] == 1
    assert not list(directory.glob("*.tmp"))


def stream(path: str, overrides: list[str]) -> tuple[list[int], float]:
    """The shape that a layer sees of the residual stream, and the loss of an evaluation."""
    trainer = build_trainer(path, overrides)
    stage = next(iter(trainer.engine.stages.values()))
    seen: list[list[int]] = []
    block = next(iter(stage.layers.values()))
    block.register_forward_hook(lambda module, inputs, output: seen.append(list(output.shape)))
    trainer.step(1)
    loss = trainer.evaluate("valid")
    trainer.close()
    return seen[0], loss


def test_a_run_with_sequence_parallelism_divides_its_tokens(run_file: Path) -> None:
    overrides = [*TINY, "train.micro_batch_size=2", "train.eval_every=1", "train.eval_batches=1", "parallel.tensor=2"]
    whole = run_distributed(stream, 2, str(run_file), overrides)
    divided = run_distributed(stream, 2, str(run_file), [*overrides, "parallel.sequence_parallel=true"])
    for before, after in zip(whole, divided, strict=True):
        assert (before[0], after[0]) == ([2, 24, 32], [1, 24, 32])
        assert after[1] == pytest.approx(before[1], rel=1e-6)


def test_a_run_over_several_sources_says_what_it_reads(run_file: Path, corpus: Path, tmp_path: Path) -> None:
    overrides = [override for override in TINY if not override.startswith("data.split")]
    sources = f"data.train=[{{prefix: {corpus}, weight: 3}}, {{prefix: {corpus}, weight: 1}}]"
    valid = f"data.valid=[{{prefix: {corpus}, name: web}}, {{prefix: {corpus}, name: code}}]"
    ramp = "train.batch_size_rampup={start: 2, increment: 2, samples: 4}"
    words = [sources, valid, ramp, "train.steps=4", "train.eval_every=4", "data.max_epochs=0.001"]
    done = megalite("train", str(run_file), *overrides, *words)
    lines = done.stdout.splitlines()
    # Two steps of two sequences, then two of four: twelve, nine and three of the sources.
    assert [line.split(" | ")[1] for line in lines if line.startswith("data: ")] == [
        "9 samples, 75.00%",
        "3 samples, 25.00%",
    ]
    assert sum(line.startswith(f"warning: {corpus} is read ") for line in lines) == 2
    assert any(line.startswith("validation loss on web: ") for line in lines)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["tokens"] for record in records if "loss" in record] == [48, 96, 192, 288]
    assert all(0 <= record["data_wait"] < 1 for record in records if "loss" in record)
    evaluations = {record["valid_set"]: record["valid_loss"] for record in records if "valid_loss" in record}
    assert list(evaluations) == ["web", "code"]
    assert evaluations["web"] == evaluations["code"]


def test_megatrons_order_leaves_its_index_in_the_runs_folder(run_file: Path, tmp_path: Path) -> None:
    megalite("train", str(run_file), *TINY, "data.order=megatron", "parallel.data=2", "train.steps=3")
    assert [path.name.split("-")[0] for path in (tmp_path / "run" / "index").iterdir() if path.is_dir()] == ["megatron"]


def test_a_run_stops_where_it_is_told_and_is_not_done(run_file: Path, tmp_path: Path) -> None:
    given = [*TINY, "train.steps=6", "checkpoint.last=false"]  # so that the second begins anew
    whole = megalite("train", str(run_file), *given).stdout.splitlines()
    stopped = megalite("train", str(run_file), *given, "train.stop_after=3").stdout.splitlines()
    assert not (tmp_path / "run" / "DONE.json").exists()
    assert json.loads((tmp_path / "run" / "earlier" / "1" / "DONE.json").read_text())["step"] == 6
    assert len((tmp_path / "run" / "earlier" / "1" / "metrics.jsonl").read_text().splitlines()) == 6
    until = [line.split(" | ")[:4] for line in whole if " | loss " in line][:3]
    assert [line.split(" | ")[:4] for line in stopped if " | loss " in line] == until


@pytest.mark.full
def test_the_resolved_configuration_trains_the_same(run_file: Path, tmp_path: Path) -> None:
    first = megalite("train", str(run_file), *TINY, "train.steps=3").stdout.splitlines()
    again = megalite(
        "train", str(tmp_path / "run" / "config.yaml"), f"run.dir={tmp_path / 'again'}"
    ).stdout.splitlines()
    losses = [[line.split(" | ")[1] for line in lines if line.startswith("step")] for lines in (first, again)]
    assert losses[0] == losses[1]


def test_a_run_that_diverges_ends_with_one_message(run_file: Path, tmp_path: Path) -> None:
    overrides = (*TINY, "parallel.pipeline=2", "train.optimizer.lr=1.0e+38", "train.max_bad_steps=3")
    done = megalite("train", str(run_file), *overrides, "train.schedule={name: constant}", status=2)
    (message,) = [line for line in done.stderr.splitlines() if "train.max_bad_steps=3" in line]
    assert "to step 4, had a gradient that is not finite" in message
    assert "rank 0 (tensor 0, pipeline 0, data 0) was the first" in message
    assert "Traceback" not in done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [False, True, True, True]
    assert lines[-1]["loss"] is None
    assert not (tmp_path / "run" / "DONE.json").exists()


def spans_of_a_step(path: str, overrides: list[str], late: int) -> list[tuple[str, float, float]]:
    """What a recorded step measures where one rank waits half a second longer for its batch than the others."""
    trainer = build_trainer(path, overrides)
    trainer.step(1)
    take = trainer.batches.take

    def taking(step: int) -> list[SampleMicrobatch]:
        if trainer.mesh.rank == late:
            time.sleep(1.0)
        return take(step)

    trainer.batches.take = taking
    spans = trainer.step(2).spans
    trainer.close()
    return [(str(span.instruction), span.start, span.end) for span in spans]


@pytest.mark.parametrize("late", [0, 1])
def test_a_measured_timeline_has_one_zero_whoever_waits_for_data(run_file: Path, late: int) -> None:
    given = [*TINY, "parallel.pipeline=2", "train.trace_steps=[2]"]
    first, last = run_distributed(spans_of_a_step, 2, str(run_file), given, late)
    sent, received = first[0][2], last[0][1]
    assert sent - 0.05 < received < sent + 0.5, "the second stage began before it had its input, or long after"
    assert first[0][1] < 0.5
