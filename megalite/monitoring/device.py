"""Peak FLOP/s of a device, from data sheets or measured, and its peak memory use."""

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
    """The peak rate that MFU is relative to, in FLOP/s over all ranks, and the source of the number."""

    flops: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return this device's peak rate of matrix products in FLOP/s, and its source: a data sheet or a measurement.

    The measurement is in the run's precision. All ranks measure at the same time, since the ranks of a machine share
    its cores.
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
    """Wait until an accelerator has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype, kernels: Kernels, seconds: float = 0.25) -> float:
    """Measure matrix products on this device for `seconds`; return the best rate in FLOP/s.

    If a single product takes longer, it is measured once. A smaller product warms the device up.
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
