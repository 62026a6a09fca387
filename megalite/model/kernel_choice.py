"""Kernel selection at the start of a run: benchmarks of matrix products and attention on this device."""

import torch

from megalite.kernels.choice import MIN_PRODUCT_SPEEDUP, AttentionKernel, Kernels, Products, choose_products, time_ratio
from megalite.model.causal_attention import causal_attention

_MIN_ATTENTION_SPEEDUP = 1.35
"""How many times faster written-out attention must be than fused attention, which saves fewer tensors.

Measured: 1.7 in bf16 with bf16 units, 1.25 in fp32 with AVX-512, 1.0 with AVX2. The threshold is far from these values,
so that every start on a machine makes the same choice.
"""
_SWITCH_SPEEDUP = 2.0
"""How many times faster than the saved kind of products the other kind must be."""


def choose_kernels(
    device: torch.device,
    dtype: torch.dtype,
    *,
    products: Products | None = None,
    attention: AttentionKernel | None = None,
    saved: Kernels | None = None,
) -> Kernels:
    """Benchmark a CPU for about 0.3 s, and return its fastest kernels in the precision of `dtype`.

    `products` and `attention` override the choice. `saved` are the kernels of the checkpoint that a run resumes from.
    They are kept, so that the resumed run is bit-equal to the uninterrupted run, unless the other kind of 16-bit
    products is more than twice as fast, as on a different kind of machine.
    """
    if device.type != "cpu":
        return Kernels(products or "native", attention or "fused")
    if products is None:
        margin = {None: MIN_PRODUCT_SPEEDUP, "native": _SWITCH_SPEEDUP, "fp32": 1 / _SWITCH_SPEEDUP}
        products = choose_products(device, dtype, margin[saved and saved.products])
    if attention is None:
        attention = saved.attention if saved else _faster_attention(dtype, products)
    return Kernels(products, attention)


def _faster_attention(dtype: torch.dtype, products: Products) -> AttentionKernel:
    """Benchmark a forward and a backward of 512 tokens and two heads of width 64 with each kernel."""
    query, key, value = inputs = [torch.randn(1, 512, 2, 64).to(dtype).requires_grad_() for _ in range(3)]
    gradient = torch.randn(1, 512, 2, 64).to(dtype)

    def attend(attention: AttentionKernel) -> None:
        attended = causal_attention(query, key, value, kernels=Kernels(products, attention))
        torch.autograd.grad(attended, inputs, gradient)

    ratio = time_ratio(lambda: attend("fused"), lambda: attend("written_out"))
    return "written_out" if ratio > _MIN_ATTENTION_SPEEDUP else "fused"
