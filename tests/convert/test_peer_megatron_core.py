"""Checkpoints that Megatron-core itself writes, and the losses it computes: `make peers` installs it, else skipped."""

import zlib
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from harness import run_distributed
from torch import Tensor

from megalite.convert.megatron.reader import MegatronWeights
from megalite.model.load import load_stage
from megalite.model.microbatch import Microbatch
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24}
LLAMA: dict[str, Any] = SIZES | {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
GPT: dict[str, Any] = SIZES | {"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True}
ROPE: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": 500}
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": GPT | {"position_embedding_type": "learned_absolute"},
    "llama": LLAMA | ROPE,
    "llama, untied": LLAMA | ROPE | {"untie_embeddings_and_output_weights": True},
    "llama, grouped": LLAMA | ROPE | {"num_query_groups": 2, "kv_channels": 6, "add_qkv_bias": True},
    "llama, qk norm": LLAMA | ROPE | {"num_query_groups": 2, "qk_layernorm": True},
    "llama, longer": LLAMA | ROPE | {"rotary_seq_len_interpolation_factor": 2},
    "rotary gpt": GPT | ROPE | {"rotary_percent": 0.5},
    "rotary gpt, exact gelu": GPT | ROPE | {"bias_gelu_fusion": False},
}


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 48, (2, 13), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


def scattered(options: dict[str, Any], world_size: int) -> Any:
    """Megatron-core's model of these options, on a CPU, no two numbers of it the same."""
    from megatron.core import parallel_state  # pyright: ignore[reportMissingImports]
    from megatron.core.models.gpt import GPTModel  # pyright: ignore[reportMissingImports]
    from megatron.core.models.gpt.gpt_layer_specs import (  # pyright: ignore[reportMissingImports]
        get_gpt_layer_local_spec,
    )
    from megatron.core.transformer import TransformerConfig  # pyright: ignore[reportMissingImports]

    parallel_state.initialize_model_parallel(world_size)
    swiglu, qk_layernorm = options["swiglu"], options.get("qk_layernorm", False)
    config = TransformerConfig(
        **{key: options[key] for key in (*SIZES, "normalization", "add_bias_linear")},
        num_query_groups=options.get("num_query_groups", SIZES["num_attention_heads"]),
        kv_channels=options.get("kv_channels", 4),
        add_qkv_bias=options.get("add_qkv_bias", False),
        gated_linear_unit=swiglu,
        activation_func=torch.nn.functional.silu if swiglu else torch.nn.functional.gelu,
        bias_activation_fusion=not swiglu and options.get("bias_gelu_fusion", True),
        qk_layernorm=qk_layernorm,
        tensor_model_parallel_size=world_size,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization=options["normalization"]),
        vocab_size=48,
        max_sequence_length=12,
        position_embedding_type=options["position_embedding_type"],
        rotary_percent=options.get("rotary_percent", 1.0),
        rotary_base=options.get("rotary_base", 10000),
        seq_len_interpolation_factor=options.get("rotary_seq_len_interpolation_factor"),
        share_embeddings_and_output_weights=not options.get("untie_embeddings_and_output_weights", False),
    )
    for name, parameter in model.named_parameters():
        rank = torch.distributed.get_rank() if getattr(parameter, "tensor_model_parallel", False) else 0
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + rank)
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def save_and_score(root: str, options: dict[str, Any], world_size: int) -> Tensor:
    """Write what Megatron's trainer writes of the model; return its losses, a token each."""
    from megatron.core import tensor_parallel  # pyright: ignore[reportMissingImports]

    # It asks for CUDA's generator and device, whatever the model is on.
    tracker = Namespace(fork=nullcontext)
    with (
        patch.object(torch.cuda, "current_device", lambda: "cpu"),
        patch.object(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker),
    ):
        model = scattered(options, world_size).eval()
        ids, targets = batch()
        mask = torch.ones(1, 1, 12, 12).triu(1).bool()
        with torch.no_grad():
            losses = model(ids, torch.arange(12).expand(2, 12), mask, labels=targets)
    args = {"max_position_embeddings": 12, "group_query_attention": "num_query_groups" in options} | options
    content = {"args": Namespace(**args), "checkpoint_version": 3.0, "model": model.state_dict_for_save_checkpoint()}
    folder = Path(root, "iter_0000007", f"mp_rank_{torch.distributed.get_rank():02d}")
    folder.mkdir(parents=True)
    torch.save(content, folder / "model_optim_rng.pt")
    Path(root, "latest_checkpointed_iteration.txt").write_text("7")
    return losses


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_are_megatron_cores(tmp_path: Path, options: dict[str, Any], world_size: int) -> None:
    pytest.importorskip("megatron.core.models.gpt", reason="Megatron-core is not installed")
    expected, *_ = run_distributed(save_and_score, world_size, str(tmp_path), options, world_size)
    weights = MegatronWeights(tmp_path)
    model = weights.model
    stage = Stage(model, range(model.num_hidden_layers), index=0, num_stages=1, group=TensorGroup())
    load_stage(stage, weights)
    ids, targets = batch()
    batches = [Microbatch(ids[:, : n + 1], targets[:, : n + 1]) for n in range(12)]
    losses = torch.stack([stage({}, microbatch=each).losses["loss"] * (n + 1) for n, each in enumerate(batches)])
    mean = expected.mean(0).cumsum(0)
    torch.testing.assert_close(losses.detach(), mean, rtol=1e-5, atol=1e-5)
