"""The Transformer: `transformer` holds its blocks, `stage` the part of the model that a pipeline stage holds.

`shapes` and `flops` need the configuration alone. `load` loads `weights` into a stage; attention uses `kv_cache` and
`packing`; `activation_checkpointing` recomputes activations in the backward; `kernel_choice` benchmarks the kernels of
attention.
"""
