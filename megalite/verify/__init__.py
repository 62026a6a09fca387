"""One step of a layout held against the same step in one process of plain torch, in fp32: ``megalite verify``.

- `layouts`: the layouts of a run that are compared; `scaled_down`: a smaller model of the same shape.
- `reference`: the step in one process. `comparison`: the step on the ranks, each comparing what it holds.
- `parity_report`: what came of it, within which tolerances, in words; `table`: on the console.
"""
