"""Collectives of JSON values: gather one from every rank, broadcast one from rank 0, let rank 0 decide."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megalite.errors import CommonError, UserError
from megalite.parallel.mesh import ProcessGrid

T = TypeVar("T")


def gather_json(value: Any, grid: ProcessGrid) -> list[Any]:
    """Return what every rank passed, in the order of ranks; JSON on the wire, since pickles are not to be trusted."""
    text = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    sizes = torch.zeros(grid.layout.world_size, dtype=torch.int64, device=grid.device)
    sizes[grid.rank] = len(text)
    dist.all_reduce(sizes)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=grid.device)
    padded[: len(text)] = torch.from_numpy(text.copy()).to(grid.device)
    parts = [torch.empty_like(padded) for _ in range(grid.layout.world_size)]
    dist.all_gather(parts, padded)
    return [json.loads(part[:size].cpu().numpy().tobytes()) for part, size in zip(parts, sizes.tolist(), strict=True)]


def broadcast_json(value: Any, grid: ProcessGrid) -> Any:
    """Return what rank 0 passed, on every rank; what the others pass is not looked at. Collective; JSON on the wire."""
    text = np.frombuffer(json.dumps(value if grid.rank == 0 else None).encode(), dtype=np.uint8)
    size = torch.tensor(len(text), dtype=torch.int64, device=grid.device)
    dist.broadcast(size, src=0)
    message = torch.zeros(int(size), dtype=torch.uint8, device=grid.device)
    if grid.rank == 0:
        message.copy_(torch.from_numpy(text.copy()))
    dist.broadcast(message, src=0)
    return json.loads(message.cpu().numpy().tobytes())


def on_rank_zero(call: Callable[[], T], grid: ProcessGrid) -> T:
    """Call on rank 0 alone and return what that returned, JSON, on every rank. Collective.

    For what all ranks must find alike and each would find for itself in a file system, which may show one host what
    another does not see yet. Raises CommonError on every rank where the call raises UserError.
    """
    found, refusal = None, None
    if grid.rank == 0:
        try:
            found = call()
        except UserError as error:
            refusal = str(error)
    found, refusal = broadcast_json([found, refusal], grid)
    if refusal is not None:
        raise CommonError(refusal)
    return found
