"""Which rank counts each parameter in the gradient's norm, so that every element counts once."""

from torch import nn

from megalite.model.stage import Stage
from megalite.parallel.mesh import Mesh


def mark_for_norm(stage: Stage, mesh: Mesh) -> None:
    """Mark which ranks count each parameter in the gradient's norm: exactly one for every element of the model.

    DeepSpeed: without a mark, only model-parallel rank 0 counts what is whole on every rank, and so the norms and
    biases of every stage but the first are lost.
    """
    copy = None if mesh.has_first_stage else stage.tied_copy
    for placed in stage.placed_parameters:
        parameter, is_copy = placed.parameter, placed.parameter is copy
        alike = {*mesh.layout.names_of("model")} - {"pipeline", *placed.shards[0].spec.sharding}
        counts = not is_copy and mesh.is_first_along(*alike)
        parameter.ds_pipe_replicated = is_copy  # pyright: ignore[reportAttributeAccessIssue]
        parameter.model_parallel = counts  # pyright: ignore[reportAttributeAccessIssue]


def counts_in_norm(parameter: nn.Parameter) -> bool:
    return bool(parameter.model_parallel)  # pyright: ignore[reportAttributeAccessIssue]


def is_tied(parameter: nn.Parameter) -> bool:
    return bool(parameter.ds_pipe_replicated)  # pyright: ignore[reportAttributeAccessIssue]
