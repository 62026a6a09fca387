"""The model with its tokens divided between sharded layers: loss and every gradient as without."""

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
    documents_at,
    model_config,
    whole_weights,
)
from harness import run_distributed
from reference_model import ReferenceModel
from torch import Tensor

from megalite.model.microbatch import Microbatch
from megalite.model.packing import PackedDocuments
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup
from megalite.pipeline.stage_io import StageOutput

ROWS, LENGTH = 3, 20  # shares of 30 and 15 tokens: none ends where a row does
BOUNDARIES = [[3, 4, 15], [], [11]]
MODELS: dict[str, dict[str, Any]] = {
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "llama, 2 kv heads, biases": LLAMA
    | {"num_key_value_heads": 2, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "llama, normed heads, 1 kv head": QK_NORM | {"num_key_value_heads": 1},
    "llama 3 positions": LLAMA | {"rope_scaling": LLAMA3},
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "gpt_neox, in turn": NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_tanh"},
}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, targets and loss weights ``[B, S]``."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH + 1), generator=generator)
    weights = torch.rand(ROWS, LENGTH, generator=generator)
    return tokens[:, :-1], tokens[:, 1:], weights / weights.sum()


def gradients(stages: list[Stage]) -> dict[tuple[int, str], Tensor | None]:
    return {(stage.index, held.name): held.parameter.grad for stage in stages for held in stage.placed_parameters}


def run(stages: list[Stage], packing: PackedDocuments | None) -> Tensor:
    ids, targets, weights = batch()
    microbatch, output = Microbatch(ids, targets, packing, weights), StageOutput({}, {})
    for stage in stages:
        output = stage(output.activations, microbatch=microbatch)
        shapes = {name: spec.shape for name, spec in stage.edge(ROWS, LENGTH).items()}
        assert {name: tuple(x.shape) for name, x in output.activations.items()} == shapes
    loss = output.losses["loss"]
    loss.backward()
    for stage in stages:
        for parameter in stage.sequence_parallel_parameters():
            torch.distributed.all_reduce(parameter.grad)
    return loss


def compare(fields: dict[str, Any], num_stages: int, packed: bool, overlap: bool) -> None:
    config, weights = model_config(fields), whole_weights(model_config(fields))
    packing = documents_at(BOUNDARIES, LENGTH) if packed else None
    divided = cut_stages(config, weights, num_stages, rows=ROWS, sequence_parallel=True, overlap=overlap)
    whole = cut_stages(config, weights, num_stages)
    found, expected = run(divided, packing), run(whole, packing)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    wanted = gradients(whole)
    for key, gradient in gradients(divided).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    if packing is None:
        ids, targets, loss_weights = batch()
        reference = ReferenceModel(config, weights)
        (reference.losses(ids, targets) * loss_weights).sum().backward()
        assert_gradients_agree(divided, reference)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(("world_size", "num_stages"), [(1, 1), (2, 2), (4, 1)])
def test_divided_tokens_change_nothing(fields: dict[str, Any], world_size: int, num_stages: int, packed: bool) -> None:
    run_distributed(compare, world_size, fields, num_stages, packed, False)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "divided"])
@pytest.mark.parametrize("fields", [GPT2, QK_NORM | {"num_key_value_heads": 1}], ids=["gpt2", "llama, 1 kv head"])
def test_overlapped_collectives_change_no_bit(fields: dict[str, Any], sequence_parallel: bool) -> None:
    run_distributed(overlapped, 2, fields, sequence_parallel)


def overlapped(fields: dict[str, Any], sequence_parallel: bool) -> None:
    config, weights = model_config(fields), whole_weights(model_config(fields))
    plain, beside = (
        cut_stages(config, weights, 1, rows=ROWS, sequence_parallel=sequence_parallel, overlap=overlap)
        for overlap in (False, True)
    )
    assert torch.equal(run(plain, None), run(beside, None))
    expected = gradients(plain)
    for key, gradient in gradients(beside).items():
        wanted = expected[key]
        assert gradient is not None
        assert wanted is not None
        assert torch.equal(gradient, wanted), key


def put_off(fields: dict[str, Any]) -> None:
    config, weights = model_config(fields), whole_weights(model_config(fields))
    now, later = (cut_stages(config, weights, 1, rows=ROWS, sequence_parallel=True) for _ in range(2))
    run(now, None)
    with later[0].weight_grad_deferral.enabled() as products:
        run(later, None)
    assert len(products) > 2 * SHAPE["num_hidden_layers"]
    products.run(lambda parameter, gradient: parameter.__setattr__("grad", gradient))
    expected = gradients(now)
    for key, gradient in gradients(later).items():
        wanted = expected[key]
        assert gradient is not None
        assert wanted is not None
        assert torch.equal(gradient, wanted), key


@pytest.mark.parametrize("fields", [NEOX, LLAMA | {"num_key_value_heads": 1}], ids=["gpt_neox", "llama, 1 kv head"])
def test_gradients_put_off_gather_their_tokens_then(fields: dict[str, Any]) -> None:
    run_distributed(put_off, 2, fields)


def kept() -> list[int]:
    """Bytes that the forward keeps for the backward, without and with divided tokens, parameters left out."""
    sizes = []
    for divides in (False, True):
        config = model_config(GPT2 | {"hidden_size": 64, "intermediate_size": 64})
        stage = cut_stages(config, whole_weights(config), 1, rows=ROWS, sequence_parallel=divides)[0]
        own = {p.untyped_storage().data_ptr() for p in stage.parameters()}
        storages: dict[int, int] = {}

        def note(tensor: Tensor, own: set[int] = own, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            stage({}, microbatch=Microbatch(*batch()[:2]))
        sizes.append(sum(storages.values()))
    return sizes


def test_less_is_kept_for_the_backward() -> None:
    whole, divided = run_distributed(kept, 4)[0]
    token_states = SHAPE["num_hidden_layers"] * ROWS * LENGTH * 64 * 4
    # A layer keeps two inputs of norms and two of column-parallel layers: a quarter of each is left.
    assert whole - divided > 3 * token_states * 0.9


def test_what_stands_on_the_stream_is_partial() -> None:
    def names(fields: dict[str, Any], group: TensorGroup) -> set[str]:
        stage = Stage(model_config(fields), range(1), index=0, num_stages=1, group=group, rows=2)
        partial = {id(parameter) for parameter in stage.sequence_parallel_parameters()}
        return {p.name.removeprefix("layers.0.") for p in stage.placed_parameters if id(p.parameter) in partial}

    group = TensorGroup(1, 4, sequence_parallel=True)
    norms = {"attention_norm.weight", "mlp_norm.weight", "final_norm.weight"}
    biases = {name.replace("weight", "bias") for name in norms} | {"attention.output.bias", "mlp.down.bias"}
    assert names(QK_NORM | {"num_key_value_heads": 1, "attention_bias": True}, group) == norms
    assert names(NEOX, group) == norms | biases
    assert names(GPT2, group) == norms | biases | {"embedding.positions.weight"}
    assert names(GPT2, TensorGroup(1, 4)) == set()
    assert names(GPT2, TensorGroup(sequence_parallel=True)) == set()


def test_a_stage_of_shares_must_know_its_rows() -> None:
    with pytest.raises(ValueError, match="needs `rows`"):
        Stage(model_config(LLAMA), range(1), index=1, num_stages=3, group=TensorGroup(0, 2, sequence_parallel=True))
    Stage(model_config(LLAMA), range(1), index=1, num_stages=3, group=TensorGroup(sequence_parallel=True))
