"""GPT-NeoX in the names of transformers."""

from megalite.model.formats.hugging_face import QUERY_KEY_VALUE, HuggingFaceFormat, Module, Setting, same_names

FORMAT = HuggingFaceFormat(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    settings=(
        *same_names("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *same_names("max_position_embeddings"),
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
    prefix="gpt_neox.",
    embedding=(Module("embed_in", ("embedding.tokens",)),),
    layer="layers.{}",
    layers=(
        Module("input_layernorm", ("attention_norm",)),
        Module("attention.query_key_value", QUERY_KEY_VALUE, by_head=True),
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
