"""The model-parallel unit (mpu): process groups, ranks and sizes of a mesh, in DeepSpeed's interface."""

import torch.distributed as dist

from megalite.parallel.mesh import Mesh


class ModelParallelUnit:
    """The *mpu* argument of `deepspeed.initialize`: process groups, ranks and sizes of a mesh.

    Its data-parallel group is the one that ZeRO divides over.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.shard.process_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.shard.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.shard.size

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._mesh.shard.process_group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.model.process_group

    def get_model_parallel_rank(self) -> int:
        return self._mesh.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.model.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._mesh.tensor.process_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tensor.size

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.pipeline.process_group

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._mesh.pipeline.rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.pipeline.size
