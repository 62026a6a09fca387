"""Pipeline parallelism: a schedule is data, and everything else reads it.

::

    schedule ──> a stream of instructions per stage ──┬──> executor ──> a measured Timeline ──┬──> plot
    (gpipe, one_f_one_b, forward_only)                └──> simulate ──> the ideal Timeline ───┘

`instructions`, `schedule`, `partition`, `simulate`, `timeline` and `plot` are pure: no torch, no process, no clock.
Only `p2p` and `executor` touch tensors.
"""
