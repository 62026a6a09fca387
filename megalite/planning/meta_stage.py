"""Pipeline stages on the meta device: parameters with shapes and without memory."""

from typing import TYPE_CHECKING

from megalite.config import ModelConfig

if TYPE_CHECKING:
    from megalite.model.stage import Stage


def meta_stage(
    model: ModelConfig,
    layers: range,
    index: int,
    num_stages: int,
    tensor_rank_and_size: tuple[int, int],
    shares_rank: bool = False,
) -> "Stage":
    """Return a stage without memory for its parameters; with `shares_rank` without a tied table that it shares."""
    import torch

    from megalite.model.stage import Stage
    from megalite.parallel.tensor_group import TensorGroup

    with torch.device("meta"):
        group = TensorGroup(*tensor_rank_and_size)
        first = Stage(model, (), index=0, num_stages=num_stages, group=group) if shares_rank else None
        table = first.tied_table if first is not None else None
        return Stage(model, layers, index=index, num_stages=num_stages, group=group, table=table)
