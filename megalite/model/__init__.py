"""The model: `families` has a folder for each, `registry` lists them, `stage` is the part that a pipeline stage holds.

A family composes its layers of `transformer` and `embedding`; `config` has the keys of all of them. `structure` derives
shapes and FLOPs from the configuration alone. `load` loads `weights` into a stage; attention uses `kv_cache` and
`packing`; `activation_checkpointing` recomputes activations in the backward; `kernel_choice` benchmarks the kernels of
attention.
"""
