"""Pipeline parallelism: a schedule is data, and everything else reads it.

::

    placement ──> schedule ──> a stream of instructions per rank ──┬──> executor ──> a measured Timeline ──┬──> plot
    (which rank   (gpipe, 1f1b, interleaved_1f1b,                  └──> simulate ──> the ideal Timeline ───┴──> trace
    holds what)   zb_h1, zb_v, forward_only)

`placement`, `instructions`, `schedule`, `partition`, `simulate`, `timeline`, `plot` and `trace` are pure: no torch, no
process, no clock. Only `p2p` and `executor` touch tensors.
"""
