"""The Transformer: `transformer` holds its blocks, read top to bottom like the papers; `stage` cuts it in stages.

`shapes` and `flops` follow from the configuration alone. `load` fills a stage from `weights`; `kv_cache` and `packing`
go with attention; `activation_checkpointing` computes activations anew; `kernel_choice` measures attention's kernels.
"""
