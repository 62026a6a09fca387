"""The ZeRO engine on DeepSpeed (arXiv:1910.02054): the only package that imports deepspeed.

`engine` runs DeepSpeed under the pipeline, `optimizer_state` reads and restores the optimizer's state for checkpoints,
`grad_norm` marks the parameters that a rank counts in the gradient norm, `mpu` gives DeepSpeed its process groups, and
`deepspeed_patches` holds monkey patches.
"""

import os

import torch

# DeepSpeed reads the variable when it is imported, so it is set before any module here imports deepspeed.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
