"""The model, cut by tensor and pipeline ranks, against a plain reference: loss and every gradient."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cut_stages import (
    GPT2,
    LLAMA,
    LLAMA3,
    NEOX,
    QK_NORM,
    SHAPE,
    assert_gradients_agree,
    cut_stages,
    loss_of,
    model_config,
    whole_weights,
)
from harness import run_distributed
from reference_model import ReferenceModel, stage_shapes
from torch import Tensor

from megalite.model.loss import cross_entropy
from megalite.model.microbatch import Microbatch
from megalite.model.stage import Stage
from megalite.parallel.sharding import ShardSpec
from megalite.parallel.tensor_group import TensorGroup
from megalite.pipeline.stage_io import StageOutput
from megalite.tensor_parallel.cross_entropy import VocabParallelLogits

MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "llama, 2 kv heads, biases": LLAMA | {"num_key_value_heads": 2, "attention_bias": True},
    "llama, biases everywhere": LLAMA | {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "llama, 1 kv head": LLAMA | {"num_key_value_heads": 1},
    "llama, wide heads": LLAMA | {"head_dim": 16, "num_key_value_heads": 2},
    "llama, normed heads": QK_NORM,
    "llama, normed heads, 2 kv heads, biases": QK_NORM | {"num_key_value_heads": 2, "attention_bias": True},
    "llama, normed heads, 1 kv head": QK_NORM | {"num_key_value_heads": 1},
    "llama, positions over 4": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama 3 positions": LLAMA | {"rope_scaling": LLAMA3, "num_key_value_heads": 2},
    "gpt2": GPT2,
    "gpt2, untied": GPT2 | {"tie_word_embeddings": False},
    "gpt_neox": NEOX,
    "gpt_neox, in turn": NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_tanh"},
    "gpt_neox, plain attention, tied": NEOX | {"attention_bias": False, "tie_word_embeddings": True},
    "gpt_neox, whole heads": NEOX | {"rotary_pct": 1.0},
}


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 21), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def compare(fields: dict[str, Any], num_stages: int) -> None:
    config, (ids, targets) = model_config(fields), batch()
    weights = whole_weights(config)
    reference = ReferenceModel(config, weights)
    expected = reference(ids, targets)
    expected.backward()

    stages = cut_stages(config, weights, num_stages)
    loss = loss_of(stages, Microbatch(ids, targets))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert_gradients_agree(stages, reference)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(("world_size", "num_stages"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])
def test_loss_and_gradients_agree_with_the_plain_model(
    fields: dict[str, Any], world_size: int, num_stages: int
) -> None:
    run_distributed(compare, world_size, fields, num_stages)


@dataclass(frozen=True)
class TaughtMicrobatch(Microbatch):
    """A microbatch with the probabilities ``[B, S, V]`` of a teacher."""

    teacher: Tensor | None = None


def distil(logits: VocabParallelLogits, microbatch: Microbatch) -> dict[str, Tensor]:
    """A loss from outside, on data that the model does not know."""
    assert isinstance(microbatch, TaughtMicrobatch)
    assert microbatch.teacher is not None
    losses_BS = -(microbatch.teacher * logits.gather().log_softmax(-1)).sum(-1)
    return {"teacher": 0.5 * microbatch.average(losses_BS), **cross_entropy(logits, microbatch)}


def compare_distilled(num_stages: int, sequence_parallel: bool) -> None:
    config, (ids, targets) = model_config(LLAMA), batch()
    weights = whole_weights(config)
    teacher = torch.rand(*ids.shape, SHAPE["vocab_size"], generator=torch.Generator().manual_seed(2)).softmax(-1)
    reference = ReferenceModel(config, weights)
    expected = -0.5 * (teacher * reference.logits(ids).log_softmax(-1)).sum(-1).mean()
    (expected + reference(ids, targets)).backward()

    stages = cut_stages(config, weights, num_stages, rows=len(ids), sequence_parallel=sequence_parallel, loss=distil)
    output, microbatch = StageOutput({}, {}), TaughtMicrobatch(ids, targets, teacher=teacher)
    for stage in stages:
        output = stage(output.activations, microbatch=microbatch)
    torch.testing.assert_close(output.losses["teacher"], expected, rtol=1e-5, atol=1e-6)
    sum(output.losses.values(), torch.zeros(())).backward()
    for stage in stages:
        for parameter in stage.sequence_parallel_parameters():
            torch.distributed.all_reduce(parameter.grad)
    assert_gradients_agree(stages, reference)


@pytest.mark.parametrize(
    ("world_size", "num_stages", "sequence_parallel"), [(1, 1, False), (2, 2, False), (2, 1, True)]
)
def test_a_loss_from_outside_reads_its_own_fields_of_a_microbatch(
    world_size: int, num_stages: int, sequence_parallel: bool
) -> None:
    run_distributed(compare_distilled, world_size, num_stages, sequence_parallel)


LINEAR_OF_ATTENTION = ("query", "key", "value", "output")
BIASES = {
    "llama": (LLAMA, ()),
    "llama, biases": (LLAMA | {"attention_bias": True}, ("query", "key", "value")),
    "llama, all biases": (LLAMA | {"attention_bias": True, "attention_output_bias": True}, LINEAR_OF_ATTENTION),
    "llama, output's bias": (LLAMA | {"attention_output_bias": True}, ("output",)),
    "llama, biases of the MLP": (LLAMA | {"mlp_bias": True}, ()),
    "gpt2": (GPT2, LINEAR_OF_ATTENTION),
    "gpt_neox": (NEOX, LINEAR_OF_ATTENTION),
    "gpt_neox, plain attention": (NEOX | {"attention_bias": False}, ()),
}


@pytest.mark.parametrize(("fields", "biased"), BIASES.values(), ids=BIASES.keys())
def test_attention_has_the_biases_of_its_family(fields: dict[str, Any], biased: tuple[str, ...]) -> None:
    names = stage_shapes(model_config(fields))
    assert [part for part in LINEAR_OF_ATTENTION if f"layers.0.attention.{part}.bias" in names] == list(biased)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_norms_of_queries_and_keys_are_two_whole_tensors_of_ones(kv_heads: int) -> None:
    config = model_config(QK_NORM | {"num_key_value_heads": kv_heads})
    stage = Stage(config, range(3), index=0, num_stages=1, group=TensorGroup(1, 2))
    stage.initialise(seed=1)
    held = {placed.name: placed for placed in stage.placed_parameters}["layers.2.attention.query_key_norm.weight"]
    names = [f"layers.2.attention.{part}_norm.weight" for part in ("query", "key")]
    assert [shard.spec for shard in held.shards] == [ShardSpec(name, (16,)) for name in names]
    assert torch.equal(held.parameter, torch.ones(32))


def test_parameters_are_counted_without_padding() -> None:
    config = model_config(LLAMA)
    whole = sum(weight.numel() for weight in whole_weights(config).values())
    parts = 0
    for rank in range(2):
        stage = Stage(config, range(3), index=0, num_stages=1, group=TensorGroup(rank, 2))
        parts += stage.num_parameters()
    norms = (2 * 3 + 1) * SHAPE["hidden_size"]  # whole on both ranks
    assert parts == whole + norms


def test_a_tied_table_has_one_name_on_both_ends() -> None:
    config = model_config(LLAMA | {"tie_word_embeddings": True})
    names, tables = [], []
    for index in (0, 1):
        stage = Stage(config, range(index, index + 1), index=index, num_stages=2, group=TensorGroup())
        stage.initialise(seed=1)
        assert stage.tied_copy is not None
        names += [held.shards[0].spec.name for held in stage.placed_parameters if held.parameter is stage.tied_copy]
        tables.append(stage.tied_copy)
    assert torch.equal(*tables)
    assert names == ["embedding.tokens.weight"] * 2


def test_deeper_models_start_with_smaller_residual_branches() -> None:
    config = model_config(LLAMA | {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 512})
    stage = Stage(config, range(8), index=0, num_stages=1, group=TensorGroup())
    stage.initialise(seed=1)
    for placed in stage.placed_parameters:
        if placed.shards[0].spec.name.endswith("mlp.down.weight"):
            torch.testing.assert_close(float(placed.parameter.detach().std()), 0.2 / 4.0, rtol=0.03, atol=0.0)
