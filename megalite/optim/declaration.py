"""OptimizerDeclaration: an optimizer's hyperparameters, its state by name and shape, and how it is built. No torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class StateShape(Enum):
    """The shape of a state tensor that an optimizer keeps for each tensor that it updates."""

    PARAMETER = "the parameter's shape"
    """fp32; sharded with the parameter, and stored in checkpoints as ``STATE/PARAMETER``."""
    UPDATES = "a scalar"
    """The number of updates so far; stored once in a checkpoint, as ``optimizer.updates`` in state.json."""


@dataclass(frozen=True, slots=True)
class OptimizerDeclaration:
    """An elementwise optimizer: the update of an element depends on that element's weight, gradient and state alone.

    ZeRO updates flat partitions that divide parameters anywhere, so no other optimizer can be declared.
    """

    name: str
    """The value of ``train.optimizer.name``."""
    defaults: Mapping[str, Any]
    """The hyperparameters, under the names of the section ``train.optimizer``, with their defaults."""
    state: Mapping[str, StateShape]
    """The state by the names that the optimizer itself uses in ``torch.optim.Optimizer.state``."""
    build: "Callable[[Sequence[dict[str, Any]], Mapping[str, Any], torch.device], torch.optim.Optimizer]"
    """Build the optimizer from parameter groups, hyperparameters, and the device that holds the updated tensors."""
    deepspeed_type: str | None = None
    """The ``optimizer.type`` of a DeepSpeed JSON that selects this optimizer."""
    deepspeed_defaults: Mapping[str, Any] = field(default_factory=dict)
    """DeepSpeed's own defaults, for hyperparameters that a JSON leaves out."""

    @property
    def state_tensors(self) -> tuple[str, ...]:
        """The names of the state tensors that have their parameter's shape, in the order of the declaration."""
        return tuple(name for name, shape in self.state.items() if shape is StateShape.PARAMETER)
