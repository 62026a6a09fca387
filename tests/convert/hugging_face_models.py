"""Small Hugging Face models of every family, random and offline, as transformers saves them."""

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "llama, grouped and tied": ("llama", SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama, wide heads": ("llama", SIZES | {"num_key_value_heads": 1, "head_dim": 16}),
    "llama, biases in attention": ("llama", SIZES | {"attention_bias": True, "num_key_value_heads": 2}),
    "llama, biases everywhere": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", SIZES | {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE}),
    "llama, linear": (
        "llama",
        SIZES | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral": ("mistral", SIZES | {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral, tied": ("mistral", SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", SIZES | {"num_key_value_heads": 2}),
    "qwen2, tied": ("qwen2", SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", SIZES | {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, tied": ("qwen3", SIZES | {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True}),
    "qwen3, biases": ("qwen3", SIZES | {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": True}),
    "gpt2": ("gpt2", GPT2_SIZES),
    "gpt2, untied": ("gpt2", GPT2_SIZES | {"tie_word_embeddings": False, "n_inner": 80}),
    "gpt_neox": ("gpt_neox", SIZES),
    "gpt_neox, tied, one after the other": (
        "gpt_neox",
        SIZES
        | {
            "tie_word_embeddings": True,
            "use_parallel_residual": False,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_neox, no biases": ("gpt_neox", SIZES | {"attention_bias": False}),
}


def save_model(folder: Path, variant: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save a model with weights large enough for a wrong one to be seen; `options` are those of save_pretrained."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = VARIANTS[variant]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name or name.endswith(".bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(std=0.15)
    model.to(dtype).save_pretrained(folder, **options)
    return folder
