"""Checkpoints that know tensors by their global names, and nothing of the ranks that wrote them.

::

    a rank's parameters, flat and cut as ZeRO cuts them
      |
      |  boxes             which boxes of which global tensors they are
      v
    step_N.tmp/  ---->     store             every rank's file (safetensors_file), then one manifest, then one rename
    step_N/                manifest          what is where, of which size and digest
      |
      |  reader            any box of any tensor, for whatever layout asks
      v
    another rank's parameters

No pickle is read or written. Nothing here imports torch.
"""
