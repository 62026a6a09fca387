"""Llama, Mistral, Qwen2 and Qwen3 in the names of transformers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalite.model.formats.hugging_face import Fixed, HuggingFaceFormat, Module, Setting, same_names

_LLAMA_SETTINGS = (
    *same_names("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *same_names("max_position_embeddings", "num_key_value_heads"),
    Setting("head_dim", "head_dim", None),
    Setting("rms_norm_eps", "rms_norm_eps", 1e-6),
    Setting("initializer_range", "initializer_range", 0.02),
    Setting("tie_word_embeddings", "tie_word_embeddings", False),
)
_SILU = Fixed("hidden_act", ("silu", "swish"), "the activation is SiLU")
_ATTENTION_BIASES = tuple(
    Setting("attention_bias", ours, False) for ours in ("attention_bias", "attention_output_bias")
)
_ALL_OF_ATTENTION = frozenset(setting.ours for setting in _ATTENTION_BIASES)
_LLAMA_LAYERS = (
    Module("input_layernorm", ("attention_norm",)),
    Module("self_attn.q_proj", ("attention.query",)),
    Module("self_attn.k_proj", ("attention.key",)),
    Module("self_attn.v_proj", ("attention.value",)),
    Module("self_attn.q_norm", ("attention.query_norm",)),
    Module("self_attn.k_norm", ("attention.key_norm",)),
    Module("self_attn.o_proj", ("attention.output",)),
    Module("post_attention_layernorm", ("mlp_norm",)),
    Module("mlp.gate_proj", ("mlp.gate",)),
    Module("mlp.up_proj", ("mlp.up",)),
    Module("mlp.down_proj", ("mlp.down",)),
)


def _llama_like(
    model_type: str, causal_class: str, *settings: Setting, defaults: Mapping[str, object], **more: Any
) -> HuggingFaceFormat:
    return HuggingFaceFormat(
        model_type,
        causal_class,
        settings=(
            *(replace(one, default=defaults.get(one.ours, one.default)) for one in _LLAMA_SETTINGS),
            *settings,
        ),
        fixed=(_SILU,),
        prefix="model.",
        embedding=(Module("embed_tokens", ("embedding.tokens",)),),
        layer="layers.{}",
        layers=_LLAMA_LAYERS,
        norm=Module("norm", ("final_norm",)),
        buffers=(".rotary_emb.inv_freq",),
        **more,
    )


LLAMA = _llama_like(
    "llama",
    "LlamaForCausalLM",
    *_ATTENTION_BIASES,
    Setting("mlp_bias", "mlp_bias", False),
    defaults={"num_key_value_heads": None},
    optional_flags=(_ALL_OF_ATTENTION, frozenset({"mlp_bias"})),
)
MISTRAL = _llama_like("mistral", "MistralForCausalLM", defaults={}, always_slides=True)
QWEN2 = _llama_like(
    "qwen2",
    "Qwen2ForCausalLM",
    defaults={},
    heads_divide=False,
    names_window=True,
    flags=frozenset({"attention_bias"}),
    # The class has biases on q, k and v whatever this key says.
    inert=frozenset({"attention_bias"}),
)
QWEN3 = _llama_like(
    "qwen3",
    "Qwen3ForCausalLM",
    *_ATTENTION_BIASES,
    defaults={"head_dim": 128},
    heads_divide=False,
    names_window=True,
    flags=frozenset({"qk_norm"}),
    optional_flags=(_ALL_OF_ATTENTION,),
)
# The first that suits a model of ours is what it is written as: Mistral is Llama under another name.
FORMATS = (LLAMA, MISTRAL, QWEN2, QWEN3)
