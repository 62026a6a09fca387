"""The ranks that share a model while it generates: a tensor group, or this process alone."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megalite.launch import LaunchEnvironment
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.mesh import joined_mesh, local_device
from megalite.parallel.tensor_group import TensorGroup

_TIMEOUT = datetime.timedelta(minutes=30)


@contextmanager
def tensor_group(environment: LaunchEnvironment | None) -> Iterator[tuple[TensorGroup, torch.device]]:
    """Join all ranks that a launcher started into one tensor group, and leave them at the end.

    None where this process was started by hand, and is the only one.
    """
    if environment is None or environment.world_size == 1:
        yield TensorGroup(), local_device(environment.local_rank if environment else 0)
        return
    layout = ParallelLayout(tensor=environment.world_size)
    device = local_device(environment.local_rank, environment.launcher)
    with joined_mesh(layout, environment.rank, device=device, timeout=_TIMEOUT) as mesh:
        yield mesh.tensor, mesh.device
