"""AdamW over the parameters of a rank's stages, with parameter groups for weight decay."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megalite.config import OptimizerSection
from megalite.model.stage import Stage
from megalite.optim.uncompiled import AdamW


def make_adamw(
    stages: Mapping[int, Stage], settings: OptimizerSection, *, device: torch.device, separate_tied_table: bool = False
) -> torch.optim.Optimizer:
    """Return AdamW (arXiv:1711.05101) with two parameter groups: matrices with weight decay, norms and biases without.

    With `separate_tied_table` a tied table is a third group; on ranks without the table a matrix takes its place. The
    last few elements of a flat ZeRO partition are computed by other instructions than the rest. As a separate group the
    table is partitioned at the same elements on both stages, so that its copies stay bit-equal.

    DeepSpeed: ZeRO drops empty groups and all-reduces the norm once per group, so all ranks hang unless every rank has
    the same number of groups. No group is empty, since every stage has at least one layer.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for parameter in unique_parameters(stages):
        (decayed if parameter.ndim > 1 else undecayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    if separate_tied_table:
        tables = [stage.tied_copy for stage in stages.values() if stage.tied_copy is not None]
        separate = tables[0] if tables else decayed[0]
        decayed[:] = [parameter for parameter in decayed if parameter is not separate]
        groups.append({"params": [separate], "weight_decay": settings.weight_decay})
    assert all(group["params"] for group in groups)
    fused = _apex_fused_adam() if device.type == "cuda" else None
    if fused is not None:
        return fused(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, adam_w_mode=True)
    return AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def _apex_fused_adam() -> Any:
    try:  # PyPI has an unrelated package of this name, without optimizers
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return FusedAdam


def unique_parameters(stages: Mapping[int, Stage]) -> list[nn.Parameter]:
    """Return the parameters of all stages, each once: the first and the last stage may share a tied table."""
    return list(dict.fromkeys(parameter for stage in stages.values() for parameter in stage.parameters()))
