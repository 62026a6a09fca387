"""A model that remembers what it has read says the same as one that reads all of it again."""

from typing import Any

import pytest
import torch
from generating import FAMILIES, all_logits, whole_stage
from harness import run_distributed
from torch import Tensor

from megalite.config import read_model
from megalite.model import kv_cache as cache_module
from megalite.model.kv_cache import KVCache
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup

PROMPTS = [[5, 7, 11, 13, 17], [3], [200, 100, 50, 25, 12, 6, 3, 1, 0, 2, 4]]
CPU = torch.device("cpu")


def read_on(stage: Stage, rows: list[list[int]], steps: int) -> tuple[list[list[int]], Tensor]:
    """Continue rows greedily; return them whole, and the logits ``[steps, B, V]``."""
    rows, width = [list(row) for row in rows], max(map(len, rows))
    cache = KVCache([len(row) for row in rows], num_layers=len(stage.layers), device=CPU)
    ids = torch.tensor([row + [9] * (width - len(row)) for row in rows])
    logits = []
    for _ in range(steps):
        logits.append(stage.next_logits(ids, cache))
        ids = logits[-1].argmax(-1, keepdim=True)
        for row, token in zip(rows, ids.flatten().tolist(), strict=True):
            row.append(token)
    return rows, torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [3, 256])
@torch.inference_mode()
def test_rows_of_any_length_read_together_as_alone(family: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "BLOCK", block)
    stage = whole_stage(read_model(FAMILIES[family]))
    rows, logits = read_on(stage, PROMPTS, steps=16)
    for index, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
        expected = all_logits(stage, row[:-1])[len(prompt) - 1 :]
        torch.testing.assert_close(logits[:, index], expected, rtol=1e-4, atol=1e-4)
        assert row[len(prompt) :] == expected.argmax(-1).tolist()


@torch.inference_mode()
def test_rows_that_stay_are_not_moved_by_those_that_leave() -> None:
    stage = whole_stage(read_model(FAMILIES["llama"]))
    alone = [read_on(stage, [prompt], steps=8)[1][:, 0] for prompt in PROMPTS]
    cache = KVCache([len(prompt) for prompt in PROMPTS], num_layers=2, device=CPU)
    ids = torch.tensor([prompt + [0] * (11 - len(prompt)) for prompt in PROMPTS])
    stays = [0, 1, 2]
    for step in range(8):
        logits = stage.next_logits(ids, cache)
        for row, of in enumerate(stays):
            torch.testing.assert_close(logits[row], alone[of][step], rtol=1e-4, atol=1e-4)
        ids = logits.argmax(-1, keepdim=True)
        if step in (2, 5):  # the longest leaves first
            cache.select_rows([0, 1] if step == 2 else [1])
            ids, stays = (ids[:2], [0, 1]) if step == 2 else (ids[1:], [1])
    assert cache.columns == 1 + 8


def read_on_a_share(fields: dict[str, Any], weights: dict[str, Tensor]) -> tuple[list[list[int]], Tensor]:
    dist = torch.distributed
    group = TensorGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    model = read_model(fields)
    stage = Stage(model, range(model.num_hidden_layers), index=0, num_stages=1, group=group)
    with torch.inference_mode():
        for placed in stage.placed_parameters:
            placed.parameter.zero_()
            for shard in placed.shards:
                placed.parameter[shard.target.slices] = weights[shard.spec.name][shard.source.slices]
        return read_on(stage, PROMPTS, steps=8)


@pytest.mark.parametrize(("family", "size"), [("llama", 2), ("llama", 4), ("gpt2", 2), ("one key-value head", 2)])
def test_every_tensor_rank_sees_the_logits_of_one_process(family: str, size: int) -> None:
    stage = whole_stage(read_model(FAMILIES[family]))
    weights: dict[str, Tensor] = {}
    for placed in stage.placed_parameters:
        for shard in placed.shards:
            weights[shard.spec.name] = placed.parameter.detach()[shard.target.slices].clone()
    with torch.inference_mode():
        rows, logits = read_on(stage, PROMPTS, steps=8)
    found = run_distributed(read_on_a_share, size, FAMILIES[family], weights)
    for rank_rows, rank_logits in found:
        assert rank_rows == rows
        assert rank_logits.shape == (8, 3, 333)
        torch.testing.assert_close(rank_logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(rank_logits, found[0][1])
