"""When each rank computes which instruction: simulated, measured, drawn; no part of running a schedule. No torch.

`spans` is the common form; `simulator` makes one from a schedule, `plot` draws one, `chrome_trace` writes one as a
trace file.
"""
