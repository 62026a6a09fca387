"""The declared state of an optimizer, by the tensors that it updates."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megalite.optim.declaration import OptimizerDeclaration, StateShape


def create_state(
    optimizer: torch.optim.Optimizer, declaration: OptimizerDeclaration, tensors: Iterable[Tensor]
) -> None:
    """Create the state that is missing, with the zeros that the first update would create."""
    for tensor in tensors:
        state = optimizer.state[tensor]  # pyright: ignore[reportArgumentType]
        if not state:
            for name, shape in declaration.state.items():
                state[name] = torch.zeros_like(tensor, requires_grad=False)
                if shape is StateShape.UPDATES:
                    state[name] = torch.zeros((), dtype=torch.float32, device=tensor.device)


def set_updates(
    optimizer: torch.optim.Optimizer, declaration: OptimizerDeclaration, tensors: Iterable[Tensor], count: int
) -> None:
    """Set the number of updates so far; the state of `tensors` must exist."""
    states = [optimizer.state[tensor] for tensor in tensors]  # pyright: ignore[reportArgumentType]
    for name in (name for name, shape in declaration.state.items() if shape is StateShape.UPDATES):
        for state in states:
            state[name].fill_(count)
        for group in optimizer.param_groups:
            if name in group:  # some optimizers count updates per group
                group[name] = count
