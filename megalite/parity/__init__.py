"""One step of a layout held against the same step in one process of plain torch, in fp32: ``megalite verify``.

- `cases`: the layouts of a run that are compared; `scale`: a smaller model of the same shape.
- `reference`: the step in one process. `comparison`: the step on the ranks, each comparing what it holds.
- `finding`: what came of it, within which tolerances, in words; `table`: on the console.
"""
