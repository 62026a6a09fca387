"""Parity check (``megalite verify``): compare one step of a layout with the same step in one process of plain torch.

- `layouts`: the layouts of a run that are compared; `scaled_down`: a smaller model of the same structure.
- `reference`: the step in one process. `comparison`: the step on the ranks, each of which compares its own tensors.
- `parity_report`: the result, the tolerances, and a description of the differences; `table`: the console output.

Both steps are in fp32.
"""
