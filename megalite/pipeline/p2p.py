"""Point-to-point messages between stages: non-blocking, matched by order, a communicator for each kind of message."""

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.mesh import Link


@dataclass(frozen=True, slots=True)
class PendingReceive:
    """A posted receive; `wait` returns its tensor after the message has arrived."""

    tensor: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.tensor


class Channel:
    """One end of a link, for tensors of one shape and dtype that both ends know in advance.

    A tensor is kept alive until it was sent; `flush` waits for the sends that have not ended.
    """

    def __init__(self, link: Link, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._link, self._shape, self._dtype, self._device = link, shape, dtype, device
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Start to send a tensor; raise ValueError for a shape or dtype that the other end does not expect."""
        if tuple(tensor.shape) != self._shape or tensor.dtype != self._dtype:
            raise ValueError(f"the link carries {self._shape} {self._dtype}, not {tuple(tensor.shape)} {tensor.dtype}")
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, self._link.peer, group=self._link.group)
        assert work is not None
        self._sending.append((work, tensor))

    def receive(self) -> PendingReceive:
        """Post the receive of the next message."""
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        work = dist.irecv(tensor, self._link.peer, group=self._link.group)
        assert work is not None
        return PendingReceive(tensor, work)

    def flush(self) -> None:
        """Wait until every message was sent."""
        while self._sending:
            self._sending.popleft()[0].wait()
