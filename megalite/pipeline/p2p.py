"""Point-to-point messages between stages: non-blocking, matched by order, a communicator for each kind of message."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.mesh import Link
from megalite.pipeline.stage_io import Edge


@dataclass(frozen=True, slots=True)
class PendingReceive:
    """A posted receive; `wait` returns its tensors by name after they have arrived."""

    tensors: dict[str, Tensor]
    works: Sequence[dist.Work]

    def wait(self) -> dict[str, Tensor]:
        for work in self.works:
            work.wait()
        return self.tensors


class Channel:
    """One end of a link, for messages of named tensors, whose edge both ends know in advance.

    The tensors of a message follow each other on the link. Each is kept alive until it was sent; `flush` waits for the
    sends that have not ended.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        self._link, self._device = link, device
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, tensors: Mapping[str, Tensor], edge: Edge) -> None:
        """Start to send tensors; raise ValueError where the other end expects others."""
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != (expected := {name: (spec.shape, spec.dtype) for name, spec in edge.items()}):
            raise ValueError(f"the link carries {expected}, not {found}")
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        for name in edge:
            tensor = tensors[name].detach().contiguous()
            work = dist.isend(tensor, self._link.peer, group=self._link.group)
            self._sending.append((cast(dist.Work, work), tensor))

    def receive(self, edge: Edge) -> PendingReceive:
        """Post the receive of the next message."""
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device=self._device) for name, spec in edge.items()}
        works = [dist.irecv(tensor, self._link.peer, group=self._link.group) for tensor in tensors.values()]
        return PendingReceive(tensors, cast(Sequence[dist.Work], works))

    def flush(self) -> None:
        """Wait until every message was sent."""
        while self._sending:
            self._sending.popleft()[0].wait()
