"""The registry of optimizers, by the names that a run file gives them."""

from collections.abc import Mapping

from megalite.optim.adamw import ADAMW
from megalite.optim.declaration import OptimizerDeclaration
from megalite.optim.lion import LION

OPTIMIZERS: Mapping[str, OptimizerDeclaration] = {declaration.name: declaration for declaration in (ADAMW, LION)}


def declaration_of_type(deepspeed_type: str) -> OptimizerDeclaration:
    """Return the optimizer that an ``optimizer.type`` of a DeepSpeed JSON selects."""
    return next(found for found in OPTIMIZERS.values() if found.deepspeed_type == deepspeed_type)
