"""The global shape of every weight of a model, from its configuration alone, without torch."""

from collections.abc import Iterator

from megalite.config import ModelConfig


def weight_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the global shape of each weight by its global name, embedding first and head last."""
    return dict(_weights(model))


def _weights(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    assert model.vocab_size is not None
    hidden, is_llama = model.hidden_size, model.architecture == "llama"
    table = (model.vocab_size, hidden)
    yield "embedding.tokens.weight", table
    if model.architecture == "gpt2":
        yield "embedding.positions.weight", (model.max_position_embeddings, hidden)
    for layer in range(model.num_hidden_layers):
        for name, shape in _layer(model):
            yield f"layers.{layer}.{name}", shape
    yield from _norm("final_norm", hidden, bias=not is_llama)
    if not model.tie_word_embeddings:
        yield "head.weight", table


def _layer(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, is_llama = model.hidden_size, model.intermediate_size, model.architecture == "llama"
    width, kv_width = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    attention_bias = getattr(model, "attention_bias", True)  # GPT-2 always has biases
    yield from _norm("attention_norm", hidden, bias=not is_llama)
    yield from _linear("attention.query", width, hidden, bias=attention_bias)
    yield from _linear("attention.key", kv_width, hidden, bias=attention_bias)
    yield from _linear("attention.value", kv_width, hidden, bias=attention_bias)
    if getattr(model, "qk_norm", False):
        yield from _norm("attention.query_norm", model.head_dim, bias=False)
        yield from _norm("attention.key_norm", model.head_dim, bias=False)
    output_bias = getattr(model, "attention_output_bias", attention_bias)
    yield from _linear("attention.output", hidden, width, bias=output_bias)
    yield from _norm("mlp_norm", hidden, bias=not is_llama)
    mlp_bias = getattr(model, "mlp_bias", True)  # only Llama has the setting
    if is_llama:
        yield from _linear("mlp.gate", inner, hidden, bias=mlp_bias)
    yield from _linear("mlp.up", inner, hidden, bias=mlp_bias)
    yield from _linear("mlp.down", hidden, inner, bias=mlp_bias)


def _norm(name: str, size: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size,)
    if bias:
        yield f"{name}.bias", (size,)


def _linear(name: str, outputs: int, inputs: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)
