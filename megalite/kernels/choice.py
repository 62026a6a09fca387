"""Kernel selection: implementations of matrix products and attention, and the benchmark that chooses between them.

A CPU without bf16 or fp16 units multiplies 16-bit matrices tens of times more slowly than fp32 matrices. On such a CPU
the operands are converted to fp32 and the product is rounded back, which is as fast as fp32 and rounds no more than a
16-bit product. Storage, messages and losses keep their precision. CPUs with such units, and all accelerators, multiply
natively.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Products = Literal["native", "fp32"]
AttentionKernel = Literal["written_out", "fused"]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels that the layers of a model use; the choices differ in rounding alone."""

    products: Products = "native"
    """``fp32``: the operands of 16-bit products are converted to fp32, and the result is rounded back."""
    attention: AttentionKernel = "written_out"
    """``written_out``: plain matrix products, which keep the scores for the backward; ``fused``: torch's kernel."""

    def upcast(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the operands of a product in the precision in which it is computed."""
        if self.products == "fp32" and tensors[0].dtype in (torch.bfloat16, torch.float16):
            return tuple(tensor.float() for tensor in tensors)
        return tensors

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a @ b`` in the precision of `a`."""
        left, right = self.upcast(a, b)
        return (left @ right).to(a.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x W^T + b`` in the precision of `x`."""
        if bias is None:
            wide_x, wide_weight = self.upcast(x, weight)
            return F.linear(wide_x, wide_weight).to(x.dtype)
        wide_x, wide_weight, wide_bias = self.upcast(x, weight, bias)
        return F.linear(wide_x, wide_weight, wide_bias).to(x.dtype)

    def describe(self, dtype: torch.dtype) -> str:
        """Return a line of text on how a model of that precision is computed."""
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.float32:
            products = "float32 products"
        elif self.products == "fp32":
            products = f"{name} products computed in float32, which is faster on this CPU"
        else:
            products = f"{name} products"
        return f"{products} | {'fused' if self.attention == 'fused' else 'written-out'} attention"


NATIVE = Kernels()
"""The default kernels."""

MIN_PRODUCT_SPEEDUP = 1.5
"""How many times faster fp32 products must be to be chosen. With this margin, noise in the measurement does not change
the choice between two starts on the same machine."""


def choose_products(device: torch.device, dtype: torch.dtype, margin: float = MIN_PRODUCT_SPEEDUP) -> Products:
    """Benchmark products of `dtype` for about 0.1 s; return ``fp32`` where it is more than `margin` times faster."""
    if device.type != "cpu" or dtype == torch.float32:
        return "native"
    a, b = (torch.randn(256, 256).to(dtype) for _ in range(2))
    native, wide = (partial(Kernels(products).matmul, a, b) for products in get_args(Products))
    return "fp32" if time_ratio(native, wide) > margin else "native"


def time_ratio(first: Callable[[], object], second: Callable[[], object], budget: float = 0.1) -> float:
    """Return the CPU time of `first` divided by that of `second`, in this thread; the minimum over several rounds.

    Each is called once to warm up. Then both are called in turn, so that other load on the machine affects both: at
    least twice, and until `budget` CPU seconds are spent.
    """
    first()
    second()
    least, spent, rounds = [float("inf"), float("inf")], 0.0, 0
    while rounds < 2 or spent < budget:
        for number, action in enumerate((first, second)):
            started = time.thread_time()
            action()
            seconds = time.thread_time() - started
            least[number] = min(least[number], seconds)
            spent += seconds
        rounds += 1
    return least[0] / max(least[1], 1e-9)
