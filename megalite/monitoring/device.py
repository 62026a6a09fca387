"""What a device can do and how much of its memory was used: peak FLOP/s, measured matrix products, peak bytes."""

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megalite.kernels.choice import Kernels, choose_products

# Dense bf16/fp16 matrix products of one device, FLOP/s, from the vendors' data sheets.
ACCELERATOR_PEAKS: Mapping[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
}


@dataclass(frozen=True, slots=True)
class Peak:
    """The rate of matrix products that MFU is a share of, FLOP/s over all ranks, and where the number is from."""

    flops: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return this device's matrix-product peak in FLOP/s and its source: the data sheet's, or measured right here.

    Measured in the run's precision, by the ranks at the same time: that is what the ranks of one machine have.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, peak in ACCELERATOR_PEAKS.items():
            if all(word in name for word in part.split()):
                return peak, f"data sheet of {part}"
    kernels = Kernels(choose_products(device, dtype))
    source = "measured matrix products" + (", in fp32" if kernels.products == "fp32" else "")
    return matrix_rate(device, dtype, kernels), source


def wait_for(device: torch.device) -> None:
    """Return once an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype, kernels: Kernels, seconds: float = 0.25) -> float:
    """Return the best rate of a matrix product on this device in so many seconds, in FLOP/s.

    A product that alone takes longer is measured once, after a smaller one.
    """
    size = 768 if device.type == "cpu" else 8192
    small, a, b = (torch.randn(n, n, device=device).to(dtype) for n in (size // 8, size, size))
    kernels.matmul(small, small)
    wait_for(device)
    best, began = 0.0, time.perf_counter()
    while best == 0.0 or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        kernels.matmul(a, b)
        wait_for(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
