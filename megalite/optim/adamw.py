"""AdamW over the parameters of a rank's stages, with its groups for weight decay."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megalite.config import OptimizerSection
from megalite.model.stage import Stage
from megalite.optim.uncompiled import AdamW


def make_adamw(
    stages: Mapping[int, Stage], settings: OptimizerSection, *, device: torch.device, table_apart: bool = False
) -> torch.optim.Optimizer:
    """Return AdamW (arXiv:1711.05101) over two groups: matrices decay, norms and biases do not.

    With `table_apart` a tied table is a group of its own, and so is a matrix of each stage without one. A flat
    partition that ends within the table computes its last few elements by other instructions than the rest; as a group
    of its own the table is cut in the same places on both stages, and its copies stay equal to the last bit.

    DeepSpeed: ZeRO drops empty groups and all-reduces the norm once a group, so every stage must have as many
    groups as the others or all ranks hang. All groups hold something on every stage: a stage has a layer at least.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in params_of(stages):
        (decayed if parameter.ndim > 1 else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    if table_apart:
        tables = [stage.tied_copy for stage in stages.values() if stage.tied_copy is not None]
        alone = tables[0] if tables else decayed[0]
        decayed[:] = [parameter for parameter in decayed if parameter is not alone]
        groups.append({"params": [alone], "weight_decay": settings.weight_decay})
    assert all(group["params"] for group in groups)
    fused = _apex_fused_adam() if device.type == "cuda" else None
    if fused is not None:
        return fused(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, adam_w_mode=True)
    return AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def _apex_fused_adam() -> Any:
    try:  # PyPI's package of this name is another one and has no optimizers
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return FusedAdam


def params_of(stages: Mapping[int, Stage]) -> list[nn.Parameter]:
    """Each once, though the first and the last stage share a tied table where one rank has both."""
    return list(dict.fromkeys(parameter for stage in stages.values() for parameter in stage.parameters()))
