"""The groups, ranks and sizes of a mesh under the names by which DeepSpeed asks for them."""

import torch.distributed as dist

from megalite.parallel.mesh import ProcessGrid


class ModelParallelUnit:
    """What DeepSpeed calls an *mpu*: the groups, ranks and sizes of a grid, under the names that it asks for."""

    def __init__(self, grid: ProcessGrid) -> None:
        self._grid = grid
        at, layout = grid.coordinate, grid.layout
        self._model_rank = at.pipeline * layout.tensor + at.tensor

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._grid.data

    def get_data_parallel_rank(self) -> int:
        return self._grid.coordinate.data

    def get_data_parallel_world_size(self) -> int:
        return self._grid.layout.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._grid.data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._grid.model

    def get_model_parallel_rank(self) -> int:
        return self._model_rank

    def get_model_parallel_world_size(self) -> int:
        return self._grid.layout.pipeline * self._grid.layout.tensor

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._grid.tensor.process_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self._grid.coordinate.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._grid.layout.tensor

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._grid.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._grid.coordinate.pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._grid.layout.pipeline
