"""Collectives of JSON values: all-gather from every rank, broadcast from rank 0, call a function on rank 0 alone."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megalite.errors import CommonError, UserError
from megalite.parallel.mesh import Mesh

T = TypeVar("T")


def gather_json(value: Any, mesh: Mesh) -> list[Any]:
    """All-gather: return the values of all ranks, in the order of ranks. Sent as JSON, since pickles are not safe."""
    text = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    sizes = torch.zeros(mesh.layout.world_size, dtype=torch.int64, device=mesh.device)
    sizes[mesh.rank] = len(text)
    dist.all_reduce(sizes)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=mesh.device)
    padded[: len(text)] = torch.from_numpy(text.copy()).to(mesh.device)
    parts = [torch.empty_like(padded) for _ in range(mesh.layout.world_size)]
    dist.all_gather(parts, padded)
    return [json.loads(part[:size].cpu().numpy().tobytes()) for part, size in zip(parts, sizes.tolist(), strict=True)]


def broadcast_json(value: Any, mesh: Mesh) -> Any:
    """Broadcast: return rank 0's value on every rank; the values of other ranks are ignored. Collective."""
    text = np.frombuffer(json.dumps(value if mesh.rank == 0 else None).encode(), dtype=np.uint8)
    size = torch.tensor(len(text), dtype=torch.int64, device=mesh.device)
    dist.broadcast(size, src=0)
    message = torch.zeros(int(size), dtype=torch.uint8, device=mesh.device)
    if mesh.rank == 0:
        message.copy_(torch.from_numpy(text.copy()))
    dist.broadcast(message, src=0)
    return json.loads(message.cpu().numpy().tobytes())


def on_rank_zero(call: Callable[[], T], mesh: Mesh) -> T:
    """Call a function on rank 0 alone and broadcast its result, a JSON value, to every rank. Collective.

    All ranks get the same result, even where it depends on a network file system that shows the hosts different states.
    Raises CommonError on every rank where the call raises UserError.
    """
    result, failure = None, None
    if mesh.rank == 0:
        try:
            result = call()
        except UserError as error:
            failure = str(error)
    result, failure = broadcast_json([result, failure], mesh)
    if failure is not None:
        raise CommonError(failure)
    return result
