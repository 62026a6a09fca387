"""Pipeline parallelism: a schedule is data, and everything else reads it.

::

    placement ──> schedules ──> a stream of instructions per rank ──┬──> executor ───> a measured Timeline ──┬──> plot
    (which rank   (gpipe, 1f1b, interleaved_1f1b,                   └──> simulator ──> the ideal Timeline ───┴──> trace
    holds what)   zb_h1, zb_v, forward_only)

`instructions`, `schedules`, `partition` and `timeline/` are pure, as is `megalite.parallel.placement`: no torch, no
process, no clock. Only `p2p`, `executor` and `compute_timer` touch tensors or devices.
"""
