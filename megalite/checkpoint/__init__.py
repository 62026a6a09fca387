"""Checkpoints that know tensors by their global names, and nothing of the ranks that wrote them.

::

    what a rank updates, flat and cut as ZeRO cuts it
      |
      |  fragments, boxes    which boxes of which global tensors that is
      v
    step_N.tmp/  ---->       store              every rank's file (safetensors_file), then one manifest, then one rename
    step_N/                  manifest           what is where, of which size and digest
      |                      retention          which of a run's checkpoints stay
      |  selection           which of them a run goes on from, and whether it is of that run
      |  reader              any box of any tensor, for whatever layout asks
      v
    another rank's fragments, a stage, Hugging Face's files

`weights` has one protocol for the weights of a model wherever they lie: in these folders, in Hugging Face's
(`huggingface/`) or in Megatron's (`megatron/`); `conversion` takes them from one into another, `inspection` looks at
them. Nothing here imports torch at its top, and no pickle is read but by torch's reader of plain tensors, in
`megatron.torch_file`.
"""
