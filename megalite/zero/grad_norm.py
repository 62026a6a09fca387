"""Marks of which rank counts a parameter in the gradient norm, so that every element is counted once."""

from torch import nn

from megalite.model.stage import Stage
from megalite.parallel.mesh import Mesh


def mark_counted_in_norm(stage: Stage, mesh: Mesh) -> None:
    """Mark the parameters that this rank counts in the gradient norm: each element of the model is counted on one rank.

    DeepSpeed: without marks, only model-parallel rank 0 counts replicated parameters, so that the norms and biases of
    all stages but the first are missing in the gradient norm.
    """
    copy = None if mesh.has_first_stage else stage.tied_copy
    for placed in stage.placed_parameters:
        parameter, is_copy = placed.parameter, placed.parameter is copy
        alike = {*mesh.layout.names_of("model")} - {"pipeline", *placed.shards[0].spec.sharding}
        _mark(parameter, counts=not is_copy and mesh.is_first_along(*alike), is_copy=is_copy)


def mark_counted(parameter: nn.Parameter) -> None:
    """Mark a parameter that this rank alone holds."""
    _mark(parameter, counts=True, is_copy=False)


def _mark(parameter: nn.Parameter, *, counts: bool, is_copy: bool) -> None:
    parameter.ds_pipe_replicated = is_copy  # pyright: ignore[reportAttributeAccessIssue]
    parameter.model_parallel = counts  # pyright: ignore[reportAttributeAccessIssue]


def is_counted_in_norm(parameter: nn.Parameter) -> bool:
    """Return whether this rank counts the parameter in the gradient norm."""
    return bool(parameter.model_parallel)  # pyright: ignore[reportAttributeAccessIssue]


def is_tied(parameter: nn.Parameter) -> bool:
    """Return whether the parameter is the copy of a tied table that is not counted."""
    return bool(parameter.ds_pipe_replicated)  # pyright: ignore[reportAttributeAccessIssue]
