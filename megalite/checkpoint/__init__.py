"""The checkpoint format: tensors under their global names, independent of the ranks and the layout that wrote them.

::

    flat ZeRO fragments of a rank
      |
      |  fragments, parallel.regions    the regions of global tensors that a fragment covers
      v
    step_N.tmp/  ---->       store              every rank's file (safetensors_file), then the manifest, then a rename
    step_N/                  manifest           regions, files, sizes and digests
      |                      retention          which of a run's checkpoints are kept
      |  discovery           which checkpoints a run has, and from which it may resume
      |  compatibility       whether a checkpoint fits the run's model
      |  reader              any region of any tensor, for any layout
      v
    another rank's fragments, a stage, Hugging Face's files

`weights` reads the weights alone. `model_files` names the tokenizer and generation files stored with the weights;
`special_tokens` reads the tokens that begin and end a text. `inspection` lists and compares checkpoints; `forecast`
computes the disk space of a run. This package holds megalite's own format only: other formats are in
`megalite.convert`. No module here imports torch when it is imported.
"""
