"""Checkpoints as Megatron-LM and Megatron-DeepSpeed write them, made of known weights in plain torch."""

import enum
import random
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalite.config import ModelConfig, read_model
from megalite.model.structure import weight_shapes

SIZES: dict[str, Any] = {
    "vocab_size": 45,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
GPT2: dict[str, Any] = {"architecture": "gpt2", **SIZES}
LLAMA: dict[str, Any] = {"architecture": "llama", **SIZES}
GROUPED: dict[str, Any] = LLAMA | {"num_key_value_heads": 2, "head_dim": 6, "attention_bias": True, "qk_norm": True}
ROTARY_GPT: dict[str, Any] = {
    "architecture": "gpt_neox",
    **SIZES,
    "rotary_pct": 0.5,
    "use_parallel_residual": False,
    "hidden_act": "gelu_tanh",
}

NAMES: dict[str, dict[str, str]] = {
    "old": {
        "table": "language_model.embedding.word_embeddings.weight",
        "positions": "language_model.embedding.position_embeddings.weight",
        "head": "language_model.output_layer.weight",
        "copy": "word_embeddings_for_head.weight",
        "block": "language_model.transformer.",
        "final_norm": "final_layernorm.",
        "attention_norm": "input_layernorm.",
        "qkv": "attention.query_key_value.",
        "output": "attention.dense.",
        "query_norm": "self_attention.q_layernorm.",
        "key_norm": "self_attention.k_layernorm.",
        "mlp_norm": "post_attention_layernorm.",
        "up": "mlp.dense_h_to_4h.",
        "down": "mlp.dense_4h_to_h.",
    },
}
NAMES["legacy"] = NAMES["old"] | {
    "block": "language_model.encoder.",
    "qkv": "self_attention.query_key_value.",
    "output": "self_attention.dense.",
}
NAMES["core"] = {
    "table": "embedding.word_embeddings.weight",
    "positions": "embedding.position_embeddings.weight",
    "head": "output_layer.weight",
    "copy": "output_layer.weight",
    "block": "decoder.",
    "final_norm": "final_layernorm.",
    "attention_norm": "input_layernorm.",
    "qkv": "self_attention.linear_qkv.",
    "output": "self_attention.linear_proj.",
    "query_norm": "self_attention.q_layernorm.",
    "key_norm": "self_attention.k_layernorm.",
    "mlp_norm": "pre_mlp_layernorm.",
    "up": "mlp.linear_fc1.",
    "down": "mlp.linear_fc2.",
}
NAMES["fused"] = NAMES["core"] | {
    "attention_norm": "self_attention.linear_qkv.layer_norm_",
    "mlp_norm": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True)
class Made:
    """How a checkpoint is cut and named, and what it holds."""

    model: ModelConfig
    weights: Mapping[str, Tensor]
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    version: float = 3.0
    names: str = "legacy"
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, object], ...] = ()
    with_args: bool = True

    def args(self) -> Namespace:
        model, llama = self.model, self.model.architecture == "llama"
        told: dict[str, object] = {
            "num_layers": model.num_hidden_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "group_query_attention": model.num_key_value_heads != model.num_attention_heads,
            "num_query_groups": model.num_key_value_heads,
            "kv_channels": model.head_dim,
            "ffn_hidden_size": model.intermediate_size,
            "max_position_embeddings": model.max_position_embeddings,
            "untie_embeddings_and_output_weights": not model.tie_word_embeddings,
            "padded_vocab_size": 48,
            "vocab_size": model.vocab_size,
            "normalization": "RMSNorm" if llama else "LayerNorm",
            "position_embedding_type": "learned_absolute" if model.architecture == "gpt2" else "rope",
            "swiglu": llama,
            "add_bias_linear": not llama,
            "add_qkv_bias": llama and getattr(model, "attention_bias", False),
            "qk_layernorm": getattr(model, "qk_norm", False),
            "rotary_percent": getattr(model, "rotary_pct", 1.0),
            "bias_gelu_fusion": not llama,
            "params_dtype": self.dtype,
        }
        return Namespace(**told | dict(self.options))


def make(fields: Mapping[str, Any], **how: Any) -> Made:
    """Random weights of a model, rounded to the precision in which they will be stored."""
    model = read_model(fields)
    generator = torch.Generator().manual_seed(4)
    dtype = how.get("dtype", torch.float32)
    weights = {
        name: (torch.randn(shape, generator=generator) * 0.4).to(dtype).float()
        for name, shape in weight_shapes(model).items()
    }
    return Made(model, weights, **how)


def packed(made: Made, layer: int, leaf: str, rank: int) -> Tensor:
    """A rank's query-key-value tensor, as the version of the checkpoint packs it."""
    model = made.model
    q, k, v = (
        made.weights[f"layers.{layer}.attention.{part}.{leaf}"]
        .unflatten(0, (-1, model.head_dim))
        .chunk(made.tensor)[rank]
        for part in ("query", "key", "value")
    )
    if made.version == 0:
        return torch.cat((q, k, v)).flatten(0, 1)
    if made.version == 1:
        return torch.stack((q, k, v), dim=2).flatten(0, 2)
    grouped = q.unflatten(0, (len(k), -1))
    return torch.cat((grouped, k[:, None], v[:, None]), dim=1).flatten(0, 2)


def block(made: Made, layer: int, rank: int) -> dict[str, Tensor]:
    """A rank's tensors of one layer, by Megatron's names within the layer."""
    names, weights, llama = NAMES[made.names], made.weights, made.model.architecture == "llama"
    tensors: dict[str, Tensor] = {}
    for leaf in ("weight", "bias"):
        for norm, place in {
            "attention_norm": "",
            "mlp_norm": "",
            "query_norm": "attention.",
            "key_norm": "attention.",
        }.items():
            if (name := f"layers.{layer}.{place}{norm}.{leaf}") in weights:
                tensors[names[norm] + leaf] = weights[name]
        if f"layers.{layer}.attention.query.{leaf}" in weights:
            tensors[names["qkv"] + leaf] = packed(made, layer, leaf, rank)
        for module, key in (("attention.output", "output"), ("mlp.down", "down")):
            if (name := f"layers.{layer}.{module}.{leaf}") in weights:
                whole = weights[name]
                tensors[names[key] + leaf] = whole if leaf == "bias" else whole.chunk(made.tensor, dim=1)[rank]
        if (name := f"layers.{layer}.mlp.up.{leaf}") in weights:
            up = weights[name].chunk(made.tensor)[rank]
            gate = [weights[f"layers.{layer}.mlp.gate.{leaf}"].chunk(made.tensor)[rank]] if llama else []
            tensors[names["up"] + leaf] = torch.cat((*gate, up))
    return tensors


def table(made: Made, name: str, rank: int) -> Tensor:
    """A rank's rows of a vocabulary, padded with numbers that must not be seen."""
    whole = made.weights[name]
    return torch.cat((whole, torch.full((48 - len(whole), whole.shape[1]), 7.0))).chunk(made.tensor)[rank]


def stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return OrderedDict((name, tensor.to(dtype).clone()) for name, tensor in tensors.items())


def stage(made: Made, layers: range, rank: int, *, first: bool, last: bool) -> dict[str, Any]:
    """The model of one stage and tensor rank: nested by module up to the block, as old releases wrote it, or flat."""
    names, weights = NAMES[made.names], made.weights
    tensors: dict[str, Tensor] = {}
    if first:
        tensors[names["table"]] = table(made, "embedding.tokens.weight", rank)
        if "embedding.positions.weight" in weights:
            tensors[names["positions"]] = weights["embedding.positions.weight"]
    for local, layer in enumerate(layers):
        tensors |= {
            f"{names['block']}layers.{local}.{name}": tensor for name, tensor in block(made, layer, rank).items()
        }
    if last:
        for leaf in ("weight", "bias"):
            if f"final_norm.{leaf}" in weights:
                tensors[names["block"] + names["final_norm"] + leaf] = weights[f"final_norm.{leaf}"]
        if "head.weight" in weights:
            tensors[names["head"]] = table(made, "head.weight", rank)
        elif not first:
            tensors[names["copy"]] = table(made, "embedding.tokens.weight", rank)
    flat = stored(tensors, made.dtype)
    if made.names in ("core", "fused"):
        return flat | {"decoder.layers.0.self_attention.linear_qkv._extra_state": BytesIO(b"state of fp8")}
    nested: dict[str, Any] = {}
    for name, tensor in flat.items():
        *modules, leaf = name.split(".", 3 if name.startswith("language_model.embedding") else 2)
        at = nested
        for module in modules:
            at = at.setdefault(module, {})
        at[leaf] = tensor
    return nested


@contextmanager
def megatrons_enumeration() -> Iterator[Any]:
    """A class of Megatron's, which is there while a file is written and gone when it is read."""
    module = ModuleType("megatron.core.enums")
    found = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module=module.__name__)
    setattr(module, "ModelType", found)  # noqa: B010
    sys.modules |= {"megatron": ModuleType("megatron"), "megatron.core": ModuleType("core"), module.__name__: module}
    try:
        yield found["encoder_or_decoder"]
    finally:
        for name in ("megatron", "megatron.core", module.__name__):
            del sys.modules[name]


def save(path: Path, content: dict[str, Any], **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **how)


def around(made: Made) -> dict[str, Any]:
    """What a trainer writes beside the model: its options, versions, an optimizer, generators' states."""
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    content = {
        "iteration": 1000,
        "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 10},
        "rng_state": [states],
    }
    if made.with_args:
        content["args"] = made.args()
    return content | ({"checkpoint_version": made.version} if made.version else {})


def write_megatron_lm(root: Path, made: Made, *, zipped: bool = True) -> Path:
    """``iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt`` and the file that names the newest iteration."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "latest_checkpointed_iteration.txt").write_text("1000")
    parts = made.pipeline * made.virtual
    each = made.model.num_hidden_layers // parts
    for tensor in range(made.tensor):
        for pipeline in range(made.pipeline):
            content = around(made)
            for virtual in range(made.virtual):
                part = virtual * made.pipeline + pipeline
                layers = range(part * each, (part + 1) * each)
                key = f"model{virtual}" if made.virtual > 1 else "model"
                content[key] = stage(made, layers, tensor, first=part == 0, last=part == parts - 1)
            rank = f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if made.pipeline > 1 else "")
            with megatrons_enumeration() as model_type:
                if made.with_args:
                    content["args"].model_type = model_type
                path = root / "iter_0001000" / rank / "model_optim_rng.pt"
                save(path, content, _use_new_zipfile_serialization=zipped)
    return root / "iter_0001000"


def write_deepspeed(root: Path, made: Made) -> Path:
    """``global_step1000/mp_rank_TT_model_states.pt``: a model without a pipeline."""
    folder = root / "global_step1000"
    for tensor in range(made.tensor):
        whole = stage(made, range(made.model.num_hidden_layers), tensor, first=True, last=True)
        content = around(made) | {
            "module": whole,
            "ds_config": {"train_batch_size": 4},
            "param_shapes": [{"a": torch.Size([3])}],
        }
        save(folder / f"mp_rank_{tensor:02d}_model_states.pt", content)
    (root / "latest").write_text("global_step1000")
    return folder


def write_pipeline_module(root: Path, made: Made, *, model_states: bool = True) -> Path:
    """``global_step1000/layer_LL-model_TT-model_states.pt``: a pipeline module's list, less its functions."""
    folder, last = root / "global_step1000", made.model.num_hidden_layers + 4
    for tensor in range(made.tensor):
        embedding = {"word_embeddings.weight": table(made, "embedding.tokens.weight", tensor)}
        if "embedding.positions.weight" in made.weights:
            embedding["position_embeddings.weight"] = made.weights["embedding.positions.weight"]
        final = {
            leaf: made.weights[f"final_norm.{leaf}"]
            for leaf in ("weight", "bias")
            if f"final_norm.{leaf}" in made.weights
        }
        files = {1: embedding, last: final}
        files |= {3 + layer: block(made, layer, tensor) for layer in range(made.model.num_hidden_layers)}
        if "head.weight" in made.weights:
            files[last + 1] = {"lm_head.weight": table(made, "head.weight", tensor)}
        for number, tensors in files.items():
            save(folder / f"layer_{number:02d}-model_{tensor:02d}-model_states.pt", stored(tensors, made.dtype))
        if model_states:
            save(folder / f"mp_rank_{tensor:02d}_model_states.pt", around(made) | {"module": None})
    (root / "latest").write_text("global_step1000")
    return folder


def without_args(made: Made) -> Made:
    return replace(made, with_args=False)
