"""FLOPs per token of a forward and backward, from which MFU is computed."""

from megalite.config import ModelConfig


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Return the FLOPs of one token's forward and backward: 6 for each weight of a matrix product, and attention.

    Attention counts 12 * layers * width * sequence, for the full square of scores, as in the literature
    (arXiv:2204.02311, appendix B); the causal half that kernels skip is not subtracted.
    """
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    matrices_of_mlp = 3 if config.architecture == "llama" else 2
    assert config.vocab_size is not None
    attention = config.hidden_size * (2 * width + 2 * kv_width)
    mlp = matrices_of_mlp * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * (attention + mlp) + config.vocab_size * config.hidden_size
    return 6.0 * weights + 12.0 * config.num_hidden_layers * width * sequence_length
