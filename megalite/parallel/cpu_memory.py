"""Settings of the CPU's memory allocator: memory that a microbatch frees is reused by the next microbatch."""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep freed blocks instead of returning their pages to the kernel.

    Every microbatch allocates and frees activations of some megabytes. Returned pages cost a page fault for every
    4 KiB at their next use: 6 % of a training step. With a C library other than glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_TOP_PAD, 64 << 20)
