"""Stages cut by ranks and filled from whole weights, their gradients against a reference's, and documents in rows."""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from reference_model import ReferenceModel
from torch import Tensor

from megalite.config import ModelConfig, Recompute, read_model
from megalite.model.dropout import DropoutStreams
from megalite.model.loss import LOSS, LossFunction, cross_entropy
from megalite.model.microbatch import Microbatch
from megalite.model.packing import PackedDocuments
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup
from megalite.pipeline.partition import partition
from megalite.pipeline.stage_io import StageOutput

SHAPE = {
    "vocab_size": 301,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
}
LLAMA: dict[str, Any] = {"architecture": "llama", **SHAPE}
GPT2: dict[str, Any] = {"architecture": "gpt2", **SHAPE}
NEOX: dict[str, Any] = {"architecture": "gpt_neox", **SHAPE, "rotary_pct": 0.5}
QK_NORM: dict[str, Any] = LLAMA | {"qk_norm": True, "head_dim": 16}
# Of the rates 1, 0.1, 0.01 and 0.001 the first stays, the second is between, the others are slowed.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def model_config(fields: dict[str, Any]) -> ModelConfig:
    return read_model(fields)


def whole_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor under its global name, random biases and norms included."""
    stage = Stage(config, range(config.num_hidden_layers), index=0, num_stages=1, group=TensorGroup())
    stage.initialise(seed=3)
    weights: dict[str, Tensor] = {}
    for placed in stage.placed_parameters:
        for shard in placed.shards:
            weights[shard.spec.name] = placed.parameter.detach()[shard.target.slices].clone()
    generator = torch.Generator().manual_seed(8)
    for weight in weights.values():
        if weight.ndim == 1:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return weights


def cut_stages(
    config: ModelConfig,
    weights: dict[str, Tensor],
    num_stages: int,
    *,
    rows: int | None = None,
    sequence_parallel: bool = False,
    overlap: bool = False,
    recompute: Recompute | None = None,
    loss: LossFunction = cross_entropy,
    compiled: bool = False,
) -> list[Stage]:
    """All stages of the pipeline, each with this rank's share of the weights over the world's tensor group."""
    dist = torch.distributed
    group = TensorGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, sequence_parallel, overlap)
    stages = []
    shared: dict[str, Any] = {"num_stages": num_stages, "group": group, "rows": rows, "compiled": compiled}
    for index, layers in enumerate(partition(config.num_hidden_layers, num_stages)):
        stage = Stage(config, layers, index=index, recompute=recompute, loss=loss, **shared)
        with torch.no_grad():
            for placed in stage.placed_parameters:
                placed.parameter.zero_()
                for shard in placed.shards:
                    placed.parameter[shard.target.slices] = weights[shard.spec.name][shard.source.slices]
        stages.append(stage)
    return stages


def loss_of(stages: Sequence[Stage], microbatch: Microbatch) -> Tensor:
    """Run the stages of a whole pipeline in turn on a microbatch."""
    output = StageOutput({}, {})
    for stage in stages:
        output = stage(output.activations, microbatch=microbatch)
    return output.losses[LOSS]


def assert_gradients_agree(stages: Sequence[Stage], reference: ReferenceModel) -> None:
    """Compare this rank's gradients, summed over the stages, with its slices of the reference's, every tensor."""
    gradients: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for stage in stages:
        for placed in stage.placed_parameters:
            assert placed.parameter.grad is not None
            for shard in placed.shards:
                name = shard.spec.name
                whole = reference.w(name)
                found = gradients.setdefault(name, torch.zeros_like(whole))
                found[shard.source.slices] += placed.parameter.grad[shard.target.slices]
                seen.setdefault(name, torch.zeros_like(whole, dtype=torch.bool))[shard.source.slices] = True
    assert set(gradients) == {name.replace("/", ".") for name in reference.weights}
    for name, gradient in gradients.items():
        wanted = reference.w(name).grad
        assert wanted is not None
        torch.testing.assert_close(
            gradient[seen[name]], wanted[seen[name]], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def documents_at(
    boundaries: Sequence[Sequence[int]], length: int, *, split_attention: bool = True, reset_positions: bool = True
) -> PackedDocuments:
    """The documents of rows of `length` tokens where new ones begin at `boundaries`; each row begins one."""
    lengths = tuple(tuple(b - a for a, b in pairwise((0, *row, length))) for row in boundaries)
    positions = torch.cat([torch.arange(tokens) for tokens in chain(*lengths)]).view(len(lengths), length)
    return PackedDocuments(cu_seqlens(lengths) if split_attention else None, positions if reset_positions else None)


def cu_seqlens(lengths: Sequence[Sequence[int]]) -> Tensor:
    """The boundaries of documents of these lengths, row by row."""
    return torch.tensor([0, *accumulate(chain(*lengths))], dtype=torch.int32)


def dropout_streams(
    fields: dict[str, Any], seed: int, samples: Sequence[int], length: int, hidden: float, attention: float
) -> DropoutStreams:
    """The dropout of rows of `length` tokens in a model of these fields, at these rates."""
    config = model_config(fields | {"hidden_dropout": hidden, "attention_dropout": attention})
    streams = DropoutStreams.of(config, seed, samples, length, torch.device("cpu"))
    assert streams is not None
    return streams
