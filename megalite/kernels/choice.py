"""Which of several equal implementations a device computes matrix products and attention with, chosen by measuring.

A CPU without bf16 or fp16 units multiplies 16-bit matrices tens of times more slowly than fp32 ones. There the operands
are converted to fp32, and the product is rounded back: at the speed of fp32, and with no more rounding than before.
Storage, messages and losses keep their precision. A CPU with such units, and every accelerator, multiplies natively.
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
    """How the layers of a model compute; every choice gives the same numbers but for rounding."""

    products: Products = "native"
    """``fp32``: products of 16-bit matrices take their operands in fp32 and round the result."""
    attention: AttentionKernel = "written_out"
    """On a CPU: plain matrix products, which keep the scores for the backward, or torch's fused kernel."""

    def widened(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the operands of a product in the precision that it is computed in."""
        if self.products == "fp32" and tensors[0].dtype in (torch.bfloat16, torch.float16):
            return tuple(tensor.float() for tensor in tensors)
        return tensors

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a @ b`` in the precision of `a`."""
        left, right = self.widened(a, b)
        return (left @ right).to(a.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x W^T + b`` in the precision of `x`."""
        if bias is None:
            wide_x, wide_weight = self.widened(x, weight)
            return F.linear(wide_x, wide_weight).to(x.dtype)
        wide_x, wide_weight, wide_bias = self.widened(x, weight, bias)
        return F.linear(wide_x, wide_weight, wide_bias).to(x.dtype)

    def describe(self, dtype: torch.dtype) -> str:
        """Say on one line how a model of that precision is computed."""
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.float32:
            products = "float32 products"
        elif self.products == "fp32":
            products = f"{name} products computed in float32, which is faster on this CPU"
        else:
            products = f"{name} products"
        return f"{products} | {'fused' if self.attention == 'fused' else 'written-out'} attention"


NATIVE = Kernels()
"""What a model computes with unless told otherwise."""

FASTER_PRODUCTS = 1.5
"""How many times faster the products must be in fp32. The margin makes the choice the same at every start on a machine:
a measurement that is a little off changes nothing."""


def faster_products(device: torch.device, dtype: torch.dtype, margin: float = FASTER_PRODUCTS) -> Products:
    """Measure, for some 0.1 s, how a device multiplies matrices of `dtype` faster; `margin` in favour of native."""
    if device.type != "cpu" or dtype == torch.float32:
        return "native"
    a, b = (torch.randn(256, 256).to(dtype) for _ in range(2))
    native, wide = (partial(Kernels(way).matmul, a, b) for way in get_args(Products))
    return "fp32" if times_as_long(native, wide) > margin else "native"


def times_as_long(first: Callable[[], object], second: Callable[[], object], budget: float = 0.1) -> float:
    """Return how many times as many CPU seconds of this thread one action takes as another.

    Each is called once to warm up, and then both in turn, so that whatever else the machine does meets both: twice at
    least, and until `budget` CPU seconds are spent. The least time of each counts.
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
