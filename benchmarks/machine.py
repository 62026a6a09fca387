"""What a result was measured on: processor, cores, instruction sets, matrix rate and library versions; never a path."""

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
LIBRARIES = ("torch", "deepspeed", "numpy", "megalite")


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine, as the head of every result names it; rates in GFLOP/s."""

    processor: str
    cores: int
    memory_gib: float
    instruction_sets: tuple[str, ...]
    matrix_gflops: dict[str, float]
    versions: dict[str, str]

    def as_dict(self) -> dict[str, object]:
        """The same facts as JSON takes them."""
        return asdict(self)

    def fastest(self, other: "Machine") -> "Machine":
        """This machine with the higher of two measured matrix rates, for one of them may have met other work."""
        rates = {name: max(rate, other.matrix_gflops[name]) for name, rate in self.matrix_gflops.items()}
        return replace(self, matrix_gflops=rates)

    def markdown(self) -> str:
        """The same facts as lines of a Markdown list."""
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in self.matrix_gflops.items())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"- machine: {self.processor}, {self.cores} cores, {self.memory_gib:.0f} GiB, "
            f"{' '.join(self.instruction_sets) or 'no vector extension of note'}\n"
            f"- matrix product of 1024 x 1024 (smaller where that takes over half a second), GFLOP/s: {rates}\n"
            f"- versions: {versions}\n"
        )


def describe() -> Machine:
    """Look at this machine and measure its matrix rates; takes some five seconds on any machine."""
    cpuinfo = _cpuinfo()
    flags = set(cpuinfo.get("flags", "").split())
    cores = len(os.sched_getaffinity(0))
    rates = {
        f"{name} on {threads} thread{'s' if threads > 1 else ''}": matrix_rate(dtype, threads)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for threads in sorted({1, cores})
    }
    return Machine(
        processor=cpuinfo.get("model name", platform.processor() or platform.machine()),
        cores=cores,
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
        matrix_gflops=rates,
        versions={"python": platform.python_version(), **_versions()},
    )


def matrix_rate(dtype: torch.dtype, threads: int, size: int = 1024) -> float:
    """GFLOP/s of a square matrix product on `threads` threads, the fastest of at most two hundred in about a second.

    Other work on the machine only slows a product down. Where one takes over half a second, a smaller one is timed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    while True:
        a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        seconds = _timed(lambda a=a, b=b: a @ b)
        if seconds < 0.5 or size <= 128:
            break
        size //= 2
    began = time.perf_counter()
    for _ in range(200):
        seconds = min(seconds, _timed(lambda: a @ b))
        if time.perf_counter() - began > 1.0:
            break
    torch.set_num_threads(before)
    return 2 * size**3 / seconds / 1e9


def _timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    return dict(reversed(re.findall(r"^([^\t:]+)\s*: (.*)$", text, flags=re.MULTILINE)))


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
