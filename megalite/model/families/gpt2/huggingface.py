"""GPT-2 in the names of transformers."""

from megalite.model.formats.hugging_face import QUERY_KEY_VALUE, TANH_GELU, Fixed, HuggingFaceFormat, Module, Setting

FORMAT = HuggingFaceFormat(
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
        Fixed("activation_function", TANH_GELU, "the activation is the tanh form of GELU"),
        Fixed("scale_attn_weights", (True,), "scores are divided by the root of the head's width"),
        Fixed("scale_attn_by_inverse_layer_idx", (False,), "scores are scaled alike in every layer"),
        Fixed("add_cross_attention", (False,), "there is no second sequence to attend to"),
    ),
    prefix="transformer.",
    embedding=(Module("wte", ("embedding.tokens",)), Module("wpe", ("embedding.positions",))),
    layer="h.{}",
    layers=(
        Module("ln_1", ("attention_norm",)),
        Module("attn.c_attn", QUERY_KEY_VALUE, transposed=True),
        Module("attn.c_proj", ("attention.output",), transposed=True),
        Module("ln_2", ("mlp_norm",)),
        Module("mlp.c_fc", ("mlp.up",), transposed=True),
        Module("mlp.c_proj", ("mlp.down",), transposed=True),
    ),
    norm=Module("ln_f", ("final_norm",)),
    rotary=False,
    buffers=(".attn.bias", ".attn.masked_bias"),
    inert=frozenset({"reorder_and_upcast_attn"}),
)
