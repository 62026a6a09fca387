"""Timelines of a pipeline: when each rank runs which instruction, simulated or measured. No torch.

`spans` holds the data structure; `simulator` simulates a timeline from a schedule, `plot` draws a timeline, and
`chrome_trace` writes one as a trace file.
"""
