"""Lion's update as a torch optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Lion (arXiv:2302.06675, algorithm 2): ``w -= lr * (sign(b1 * m + (1 - b1) * g) + decay * w)``, then
    ``m = b2 * m + (1 - b2) * g``."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                moment = state["exp_avg"]
                parameter.mul_(1 - rate * decay)
                parameter.add_(torch.lerp(parameter.grad, moment, beta1).sign_(), alpha=-rate)
                moment.lerp_(parameter.grad, 1 - beta2)
        return loss
