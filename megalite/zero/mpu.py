"""The model-parallel unit (mpu): process groups, ranks and sizes of a mesh, in DeepSpeed's interface."""

import torch.distributed as dist

from megalite.parallel.mesh import Mesh


class ModelParallelUnit:
    """The *mpu* argument of `deepspeed.initialize`: process groups, ranks and sizes of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        at, layout = mesh.coordinate, mesh.layout
        self._model_rank = at.pipeline * layout.tensor + at.tensor

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.data

    def get_data_parallel_rank(self) -> int:
        return self._mesh.coordinate.data

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.layout.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._mesh.data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.model

    def get_model_parallel_rank(self) -> int:
        return self._model_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.layout.pipeline * self._mesh.layout.tensor

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._mesh.tensor.process_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.coordinate.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.layout.tensor

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._mesh.coordinate.pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.layout.pipeline
