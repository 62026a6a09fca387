"""The ZeRO engine on DeepSpeed (arXiv:1910.02054): the only package that imports deepspeed.

`engine` drives DeepSpeed from the pipeline, `optimizer_state` takes the state out of it and puts it back, `grad_norm`
marks what each rank counts in the norm, `mpu` gives DeepSpeed its groups, `deepspeed_patches` changes what it must.
"""

import os

import torch

# Before any module here imports deepspeed, which reads it then.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
