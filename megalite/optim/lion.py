"""Lion (arXiv:2302.06675): the sign of an average of momentum and gradient, with one moment per weight."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megalite.optim.declaration import OptimizerDeclaration, StateShape

if TYPE_CHECKING:
    import torch


def _build(
    groups: Sequence[dict[str, Any]], hyperparameters: Mapping[str, Any], device: "torch.device"
) -> "torch.optim.Optimizer":
    from megalite.optim.torch_lion import Lion

    return Lion(groups, **hyperparameters)


LION = OptimizerDeclaration(
    name="lion",
    # The paper: a third to a tenth of AdamW's rate, and as much more decay.
    defaults={"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1.0},
    state={"exp_avg": StateShape.PARAMETER},
    build=_build,
    deepspeed_type="Lion",
    deepspeed_defaults={"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0},
)
