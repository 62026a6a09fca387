"""Prompts continued by a model: greedily as by whole forwards, alone as in a batch, up to what ends them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from generating import CPU, FAMILIES, GREEDY, LLAMA, TEXTS, continued, greedy_tokens, save_model, whole_stage
from harness import run_distributed

from megalite.config import read_model
from megalite.generation.generator import load_generator
from megalite.generation.prompts import Prompt
from megalite.generation.request import Limits, Sampling, prepare
from megalite.generation.sequence import Continuation
from megalite.parallel.tensor_group import TensorGroup


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_whole_forwards(family: str, tmp_path: Path, tokenizer_bytes: bytes) -> None:
    stage = save_model(tmp_path / "step_0", FAMILIES[family], tokenizer_bytes)
    rows = continued(tmp_path / "step_0", TEXTS, GREEDY, Limits(12))
    for row in rows:
        with torch.inference_mode():
            expected = greedy_tokens(stage, row.prompt_ids, len(row.tokens))
        assert row.tokens == expected
    assert {row.reason for row in rows} <= {"length", "end", "positions"}


def test_a_drawn_text_does_not_depend_on_the_prompts_beside_it(llama_checkpoint: Path) -> None:
    sampling = Sampling(1.0, top_k=50, top_p=0.95, seed=7)
    together = continued(llama_checkpoint, TEXTS, sampling, Limits(10))
    for number in range(len(TEXTS)):
        # Its place among the prompts stays, what stands there changes.
        others = ["the"] * number + [TEXTS[number]]
        assert continued(llama_checkpoint, others, sampling, Limits(10))[-1].tokens == together[number].tokens


def test_the_seed_and_the_place_decide_what_is_drawn(llama_checkpoint: Path) -> None:
    first, again, other = (
        [row.tokens for row in continued(llama_checkpoint, ["the fox"] * 2, Sampling(1.0, seed=seed), Limits(10))]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first[0] != first[1]
    assert first[0] != other[0]


def test_text_ends_with_the_limit_the_positions_or_the_vocabularys_end(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    fields = {**LLAMA, "max_position_embeddings": 16}
    stage = save_model(tmp_path / "step_0", fields, tokenizer_bytes)
    [row] = continued(tmp_path / "step_0", ["the fox"], GREEDY, Limits(3))
    assert (row.reason, len(row.tokens)) == ("length", 3)
    [row] = continued(tmp_path / "step_0", ["the fox"], GREEDY, Limits(100))
    assert (row.reason, len(row.prompt_ids) + len(row.tokens)) == ("positions", 16)
    # Let what comes third be what ends a text, by the file that goes with the weights.
    with torch.inference_mode():
        made = greedy_tokens(stage, row.prompt_ids, 3)
    assert made[2] not in made[:2]
    config = tmp_path / "step_0/generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [332, made[2]]}))
    manifest = json.loads((tmp_path / "step_0/manifest.json").read_text())
    manifest["files"][config.name] = {"bytes": 0, "sha256": ""}
    (tmp_path / "step_0/manifest.json").write_text(json.dumps(manifest))
    [row] = continued(tmp_path / "step_0", ["the fox"], GREEDY, Limits(100))
    assert (row.reason, row.tokens) == ("end", made)


def test_a_stop_text_ends_a_row_and_is_not_shown(llama_checkpoint: Path) -> None:
    [free] = continued(llama_checkpoint, ["the fox"], GREEDY, Limits(12))
    assert len(free.text) > 8
    stop = free.text[5:8]
    [row] = continued(llama_checkpoint, ["the fox"], GREEDY, Limits(12, (stop,)))
    assert row.reason == "stop"
    assert row.text == free.text[: free.text.index(stop)]
    assert row.tokens == free.tokens[: len(row.tokens)]


def test_a_stop_text_that_is_only_begun_is_shown_at_the_end(llama_checkpoint: Path) -> None:
    [free] = continued(llama_checkpoint, ["the fox"], GREEDY, Limits(12))
    [row] = continued(llama_checkpoint, ["the fox"], GREEDY, Limits(12, (free.text[-2:] + "never",)))
    assert (row.reason, row.text) == ("length", free.text)


def test_a_control_token_stops_by_its_name(llama_checkpoint: Path) -> None:
    job = prepare(llama_checkpoint, [Prompt("here", "the")], sampling=GREEDY, limits=Limits(9, ("<|im_end|>",)))
    end = job.vocabulary.control_token("<|im_end|>")
    assert end == 3
    row = Continuation(job, 0)
    assert row.take(job.vocabulary.encode("fox", "here")[0])
    assert row.reason is None
    assert row.take(end) == ""
    assert row.reason == "stop"
    assert row.record()["tokens"] == 2


def test_weights_are_rounded_to_the_precision_asked_for(llama_checkpoint: Path) -> None:
    job = prepare(llama_checkpoint, [Prompt("here", "the")], sampling=GREEDY, limits=Limits(4), precision="bf16")
    told: list[tuple[int, int]] = []
    generator = load_generator(job, TensorGroup(), CPU, lambda done, total: told.append((done, total)))
    assert {parameter.dtype for parameter in generator.stage.parameters()} == {torch.bfloat16}
    whole = whole_stage(read_model(LLAMA))
    for name, parameter in generator.stage.named_parameters():
        if name != "embedding.tokens.weight" and name != "head.weight":  # padded
            assert torch.equal(parameter, whole.get_parameter(name).bfloat16())
    assert told[-1][0] == told[-1][1] == 4 * whole.num_parameters()
    row = Continuation(job, 0)
    generator.run([row], lambda row, piece: None)
    assert len(row.tokens) == 4


def continued_on_ranks(path: str, sampling: Sampling) -> list[tuple[list[int], str]]:
    dist = torch.distributed
    group = TensorGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    return [(row.tokens, row.text) for row in continued(Path(path), TEXTS, sampling, Limits(12), group)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_tensor_size_makes_the_same_text(family: str, size: int, tmp_path: Path, tokenizer_bytes: bytes) -> None:
    save_model(tmp_path / "step_0", FAMILIES[family], tokenizer_bytes)
    for sampling in (GREEDY, Sampling(1.0, top_k=40, seed=5)):
        one = continued(tmp_path / "step_0", TEXTS, sampling, Limits(12))
        expected = [(row.tokens, row.text) for row in one]
        assert run_distributed(continued_on_ranks, size, str(tmp_path / "step_0"), sampling) == [expected] * size


def test_a_broken_file_beside_the_weights_is_named(llama_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_checkpoint, tmp_path / "step_0")
    manifest = json.loads((tmp_path / "step_0/manifest.json").read_text())
    manifest["files"]["generation_config.json"] = {"bytes": 0, "sha256": ""}
    (tmp_path / "step_0/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "step_0/generation_config.json").write_text("{")
    with pytest.raises(Exception, match=r"generation_config\.json: cannot be read as JSON"):
        continued(tmp_path / "step_0", ["the"], GREEDY, Limits(1))
