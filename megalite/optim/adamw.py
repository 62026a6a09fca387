"""AdamW (arXiv:1711.05101): two moments per weight, decay apart from the gradient."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megalite.optim.declaration import OptimizerDeclaration, StateShape

if TYPE_CHECKING:
    import torch


def _build(
    groups: Sequence[dict[str, Any]], hyperparameters: Mapping[str, Any], device: "torch.device"
) -> "torch.optim.Optimizer":
    fused = _apex_fused_adam() if device.type == "cuda" else None
    if fused is not None:
        optimizer = fused(groups, **hyperparameters, adam_w_mode=True)
        for group in optimizer.param_groups:
            group["step"] = 0  # apex counts updates per group
        return optimizer
    from megalite.optim.torch_adamw import AdamW

    return AdamW(groups, **hyperparameters, fused=True)


def _apex_fused_adam() -> Any:
    try:  # PyPI has an unrelated package of this name, without optimizers
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return FusedAdam


ADAMW = OptimizerDeclaration(
    name="adamw",
    defaults={"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    state={"step": StateShape.UPDATES, "exp_avg": StateShape.PARAMETER, "exp_avg_sq": StateShape.PARAMETER},
    build=_build,
    deepspeed_type="AdamW",
    deepspeed_defaults={"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
)
