"""How a device computes products and attention fastest, measured once at the start of a run."""

import torch

from megalite.kernels.choice import MIN_PRODUCT_SPEEDUP, AttentionKernel, Kernels, Products, choose_products, time_ratio
from megalite.model.transformer import causal_attention

_FASTER_ATTENTION = 1.35
"""How many times faster the written-out attention must be than the fused one, which keeps fewer tensors.

Measured: 1.7 in bf16 with units for it, 1.25 in fp32 with AVX-512, 1.0 with AVX2. The margin is far from each that
matters, so that every start on a machine chooses alike.
"""
_RECHOICE = 2.0
"""How many times faster than the saved way of computing products another must be."""


def choose_kernels(
    device: torch.device,
    dtype: torch.dtype,
    *,
    products: Products | None = None,
    attention: AttentionKernel | None = None,
    saved: Kernels | None = None,
) -> Kernels:
    """Measure a CPU for some 0.3 s, and return how it computes fastest in the precision of `dtype`.

    `products` and `attention` are taken as they are where given. `saved` is what the checkpoint that a run resumes from
    was trained with. It stays, so that the resumed run computes to the bit as the uninterrupted one, unless 16-bit
    products are more than twice as fast otherwise: then the machine is of another kind.
    """
    if device.type != "cpu":
        return Kernels(products or "native", attention or "fused")
    if products is None:
        margin = {None: MIN_PRODUCT_SPEEDUP, "native": _RECHOICE, "fp32": 1 / _RECHOICE}
        products = choose_products(device, dtype, margin[saved and saved.products])
    if attention is None:
        attention = saved.attention if saved else _faster_attention(dtype, products)
    return Kernels(products, attention)


def _faster_attention(dtype: torch.dtype, products: Products) -> AttentionKernel:
    """Time a forward and a backward of 512 tokens and two heads of 64 by each kernel."""
    query, key, value = inputs = [torch.randn(1, 512, 2, 64).to(dtype).requires_grad_() for _ in range(3)]
    gradient = torch.randn(1, 512, 2, 64).to(dtype)

    def attend(attention: AttentionKernel) -> None:
        attended = causal_attention(query, key, value, kernels=Kernels(products, attention))
        torch.autograd.grad(attended, inputs, gradient)

    ratio = time_ratio(lambda: attend("fused"), lambda: attend("written_out"))
    return "written_out" if ratio > _FASTER_ATTENTION else "fused"
