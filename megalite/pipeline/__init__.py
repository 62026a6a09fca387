"""Pipeline parallelism: a schedule is a stream of instructions per rank, which is executed, simulated and drawn.

::

    placement ──> schedules ──> a stream of instructions per rank ──┬──> executor ───> a measured Timeline ──┬──> plot
    (which rank   (gpipe, 1f1b, interleaved_1f1b,                   └──> simulator ──> the ideal Timeline ───┴──> trace
    holds what)   zb_h1, zb_v, forward_only)

`instructions`, `schedules`, `partition` and `timeline/` are pure, as is `megalite.parallel.placement`: they use no
torch, no processes and no clock. Only `stage_io`, `p2p`, `executor` and `compute_timer` use tensors or devices.
"""
