"""Weights from other formats and into them: `open` reads weights wherever they lie, `conversion` writes them.

`huggingface` and `megatron` each know one foreign format; `logits_check` compares a converted model with transformers.
"""
