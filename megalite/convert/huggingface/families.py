"""One table a family of Hugging Face's models: its settings, its modules, and what changes nothing.

Names and defaults are those of the classes in transformers: a key that is absent from a ``config.json`` has the
default given here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megalite.config import ModelConfig
from megalite.convert.huggingface.tensor_map import Module, Tensor, tensors_of
from megalite.model.shapes import weight_shapes

REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of ``config.json`` and the key of our section `model` that it is.

    Where `words` are given, they turn their values into ours; the first that stands for a value of ours is written.
    """

    theirs: str
    ours: str
    default: object = REQUIRED
    words: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Fixed:
    """A key that has to have one of these values, the first where it is absent; `reason` says why, for a message."""

    theirs: str
    allowed: tuple[object, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`, and the models of ours that are of it.

    `prefix` stands before every name but the head's, and may be missing. `layers` are the modules of layer ``{}``.
    `flags` are the settings that all its models have on, out of `FLAGS`.
    """

    model_type: str
    architecture: str
    """Our key `model.architecture`."""
    causal_class: str
    settings: tuple[Setting, ...]
    fixed: tuple[Fixed, ...]
    prefix: str
    embedding: tuple[Module, ...]
    layer: str
    layers: tuple[Module, ...]
    norm: Module
    head: str
    other_heads: tuple[str, ...] = ()
    """Names that the head has had."""
    flags: frozenset[str] = frozenset()
    optional_flags: tuple[frozenset[str], ...] = ()
    """Groups of `FLAGS` of which a model of this family has all on, or none."""
    rotary: bool = True
    partial_rotary: float | None = None
    """The default share of a head's dims that turn; None where all do."""
    names_window: bool = False
    """Whether the class has keys for a window of attention that is used only where they say so."""
    always_slides: bool = False
    """Whether a window of attention needs no other key to say that it is there."""
    heads_divide: bool = True
    """Whether the class wants the heads to divide the hidden size even where a head's width is given."""
    buffers: tuple[str, ...] = ()
    """How the names end of stored tensors that follow from the settings."""
    inert: frozenset[str] = field(default_factory=frozenset)
    """Keys that change nothing of the function, beside `INERT`."""

    def has(self, flags: set[str]) -> bool:
        """Whether there are models of this family with these of `FLAGS` on, and no others."""
        optional = set().union(*(group for group in self.optional_flags if group <= flags))
        return self.flags <= flags and flags - self.flags == optional

    def tensors(self, model: ModelConfig) -> Iterator[Tensor]:
        """Return all tensors of a model of ours as they are stored, in the order of the layers."""
        named = [
            *(replace(module, theirs=self.prefix + module.theirs) for module in self.embedding),
            *(self._in_layer(module, layer) for layer in range(model.num_hidden_layers) for module in self.layers),
            replace(self.norm, theirs=self.prefix + self.norm.theirs),
            Module(self.head, ("head",)),
        ]
        shapes = weight_shapes(model)
        for module in named:
            yield from tensors_of(module, shapes, model.head_dim)

    def _in_layer(self, module: Module, layer: int) -> Module:
        theirs = f"{self.prefix}{self.layer.format(layer)}.{module.theirs}"
        return replace(module, theirs=theirs, ours=tuple(f"layers.{layer}.{name}" for name in module.ours))


FLAGS = ("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm")
INERT = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache", "max_length"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"),
        *("pretraining_tp", "task_specific_params", "gradient_checkpointing", "is_decoder", "is_encoder_decoder"),
        *("output_attentions", "output_hidden_states", "output_past", "return_dict", "id2label", "label2id"),
        *("problem_type", "finetuning_task", "num_labels", "tokenizer_class", "attn_implementation", "n_ctx"),
        *("chunk_size_feed_forward", "do_sample", "temperature", "top_k", "top_p", "unsloth_version", "unsloth_fixed"),
    }
)
"""Keys that change nothing of the function, nor do those that begin as in `INERT_PREFIXES`."""
INERT_PREFIXES = ("_", "summary_")

DEFAULT_WINDOW = 4096
DEFAULT_WINDOW_LAYERS = 28


def _sizes(*names: str) -> tuple[Setting, ...]:
    return tuple(Setting(name, name) for name in names)


_LLAMA_SETTINGS = (
    *_sizes("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *_sizes("max_position_embeddings", "num_key_value_heads"),
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
) -> Family:
    return Family(
        model_type,
        "llama",
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
        head="lm_head",
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
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_QUERY_KEY_VALUE = ("attention.query", "attention.key", "attention.value")
GPT2 = Family(
    "gpt2",
    "gpt2",
    "GPT2LMHeadModel",
    settings=(
        Setting("vocab_size", "vocab_size"),
        Setting("n_positions", "max_position_embeddings"),
        Setting("n_embd", "hidden_size"),
        Setting("n_layer", "num_hidden_layers"),
        Setting("n_head", "num_attention_heads"),
        Setting("n_inner", "intermediate_size", None),
        Setting("layer_norm_epsilon", "layer_norm_epsilon", 1e-5),
        Setting("initializer_range", "initializer_range", 0.02),
        Setting("tie_word_embeddings", "tie_word_embeddings", True),
    ),
    fixed=(
        Fixed("activation_function", _TANH_GELU, "the activation is the tanh form of GELU"),
        Fixed("scale_attn_weights", (True,), "scores are divided by the root of the head's width"),
        Fixed("scale_attn_by_inverse_layer_idx", (False,), "scores are scaled alike in every layer"),
        Fixed("add_cross_attention", (False,), "there is no second sequence to attend to"),
    ),
    prefix="transformer.",
    embedding=(Module("wte", ("embedding.tokens",)), Module("wpe", ("embedding.positions",))),
    layer="h.{}",
    layers=(
        Module("ln_1", ("attention_norm",)),
        Module("attn.c_attn", _QUERY_KEY_VALUE, transposed=True),
        Module("attn.c_proj", ("attention.output",), transposed=True),
        Module("ln_2", ("mlp_norm",)),
        Module("mlp.c_fc", ("mlp.up",), transposed=True),
        Module("mlp.c_proj", ("mlp.down",), transposed=True),
    ),
    norm=Module("ln_f", ("final_norm",)),
    head="lm_head",
    rotary=False,
    buffers=(".attn.bias", ".attn.masked_bias"),
    inert=frozenset({"reorder_and_upcast_attn"}),
)
GPT_NEOX = Family(
    "gpt_neox",
    "gpt_neox",
    "GPTNeoXForCausalLM",
    settings=(
        *_sizes("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *_sizes("max_position_embeddings"),
        Setting("layer_norm_eps", "layer_norm_eps", 1e-5),
        Setting("initializer_range", "initializer_range", 0.02),
        Setting("tie_word_embeddings", "tie_word_embeddings", False),
        Setting("use_parallel_residual", "use_parallel_residual", True),
        Setting("attention_bias", "attention_bias", True),
        Setting(
            "hidden_act",
            "hidden_act",
            "gelu",
            words={"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"},
        ),
    ),
    fixed=(),
    prefix="gpt_neox.",
    embedding=(Module("embed_in", ("embedding.tokens",)),),
    layer="layers.{}",
    layers=(
        Module("input_layernorm", ("attention_norm",)),
        Module("attention.query_key_value", _QUERY_KEY_VALUE, by_head=True),
        Module("attention.dense", ("attention.output",)),
        Module("post_attention_layernorm", ("mlp_norm",)),
        Module("mlp.dense_h_to_4h", ("mlp.up",)),
        Module("mlp.dense_4h_to_h", ("mlp.down",)),
    ),
    norm=Module("final_layer_norm", ("final_norm",)),
    head="embed_out",
    other_heads=("lm_head",),
    partial_rotary=0.25,
    buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
# The first that suits a model of ours is what it is written as: Mistral is Llama under another name.
FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, GPT_NEOX)}
