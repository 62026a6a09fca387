"""Checkpoints that know tensors by their global names, and nothing of the ranks that wrote them.

::

    what a rank updates, flat and cut as ZeRO cuts it
      |
      |  fragments, parallel.regions    which boxes of which global tensors that is
      v
    step_N.tmp/  ---->       store              every rank's file (safetensors_file), then one manifest, then one rename
    step_N/                  manifest           what is where, of which size and digest
      |                      retention          which of a run's checkpoints stay
      |  discovery           which checkpoints a run has, and which it may go on from
      |  compatibility       whether one is of the run's model
      |  reader              any box of any tensor, for whatever layout asks
      v
    another rank's fragments, a stage, Hugging Face's files

`weights` gives the weights alone; `model_files` names the files that go with them, `special_tokens` reads what begins
and ends a text; `inspection` looks at checkpoints, `forecast` says what a run will keep. This is megalite's own format
alone: other formats are in `megalite.convert`. Nothing here imports torch at its top.
"""
