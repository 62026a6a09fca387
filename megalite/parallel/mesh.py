"""The process mesh: every process group of a rank, and the point-to-point links between neighbouring stages.

Every group comes from one torch DeviceMesh that has the layout's axes. The links between neighbouring stages
are separate groups of two ranks each: NCCL runs the operations of a communicator first in, first out and has no tags,
so messages of different directions or kinds must not share a communicator.
"""

import datetime
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh

from megalite.errors import UserError
from megalite.parallel.cpu_memory import keep_freed_memory
from megalite.parallel.layout import Meaning, ParallelLayout
from megalite.parallel.network_interfaces import require_interfaces
from megalite.parallel.placement import MessageKind, Placement
from megalite.parallel.tensor_group import TensorGroup


@dataclass(frozen=True, slots=True)
class Link:
    """A one-way connection between this rank and `peer`, a global rank, on a separate communicator."""

    peer: int
    group: dist.ProcessGroup


@dataclass(frozen=True, slots=True)
class Links:
    """The links of one rank, by the kind of message and the pipeline rank at the other end."""

    incoming: Mapping[tuple[MessageKind, int], Link]
    outgoing: Mapping[tuple[MessageKind, int], Link]


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that differ along some axes only: this rank's index among them, their number, and their process group."""

    rank: int
    size: int
    process_group: dist.ProcessGroup


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's place in the mesh and the groups that it is a member of.

    `axes` has a group for each axis, by name, and `tensor` that of the tensor axis as its layers take it. Then there is
    a group for each meaning (`megalite.parallel.layout.Meaning`). `shard_replicas` joins the ranks whose gradients are
    averaged and that hold the same share of what ZeRO divides; None where ZeRO divides over all of `gradient`. Groups
    of the same ranks share one process group.

    `embedding` joins the ranks of the first and the last stage, which both hold a copy of a tied embedding table; it is
    None on other ranks, and where one rank holds both stages. `embedding_replicas` joins the `embedding` ranks of all
    copies of the model, which all hold the same shard of that table; it is also None with fewer than three copies,
    since a sum of two summands does not depend on their order.
    """

    layout: ParallelLayout
    placement: Placement
    rank: int
    device: torch.device
    axes: Mapping[str, Group]
    tensor: TensorGroup
    batch: Group
    gradient: Group
    shard: Group
    shard_replicas: Group | None
    loss: Group
    model: Group
    embedding: dist.ProcessGroup | None
    embedding_replicas: dist.ProcessGroup | None
    links: Links

    @property
    def pipeline(self) -> Group:
        """The ranks that hold the stages of one copy of the model."""
        return self.axes["pipeline"]

    @property
    def stages(self) -> tuple[int, ...]:
        """The pipeline stages that this rank holds."""
        return self.placement.stages_of(self.pipeline.rank)

    @property
    def tied_copies_may_differ(self) -> bool:
        """Whether the two copies of a tied table may get different rounding in the sums of their gradients.

        So it is where the first and the last stage are on different ranks and the sums have three summands or more,
        whose order matters. The same on every rank, and also where the model has no tied table.
        """
        return _first_and_last(self.placement) is not None and self.gradient.size > 2

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's losses count in the mean: of the ranks that compute the same losses, the first alone."""
        others = {*self.axes} - {"pipeline", *self.layout.names_of("loss")}
        return self.is_first_along(*others)

    def is_first_along(self, *axes: str) -> bool:
        """Return whether this rank's index along each of the axes is 0."""
        return all(self.axes[name].rank == 0 for name in axes)

    def copy_of(self, *dividing: str) -> tuple[int, int]:
        """Return which of how many equal copies this rank holds of a tensor that only the axes `dividing` divide."""
        others = [name for name in self.axes if name not in dividing]
        return self.layout.index(self.rank, *others), self.layout.size(*others)

    @property
    def has_first_stage(self) -> bool:
        return 0 in self.stages

    @property
    def has_last_stage(self) -> bool:
        return self.placement.num_stages - 1 in self.stages


_ALL_DEVICES_VISIBLE = frozenset({"megalite", "torchrun", "deepspeed"})
"""Launchers that make all devices of a host visible to each of its ranks."""


def local_device(local_rank: int, launcher: str | None = None) -> torch.device:
    """Return this rank's accelerator, or the CPU on a host without one; `launcher` started the rank, if known.

    Raises UserError where this rank would share a device with another rank.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", device_index(local_rank, torch.cuda.device_count(), launcher))
    return torch.device("cpu")


def device_index(local_rank: int, devices: int, launcher: str | None = None) -> int:
    """Return the index of a rank's device among the visible ones: its local rank, or 0 if only one device is visible.

    A single visible device belongs to this rank where the launcher may have hidden the others from it (Slurm's
    ``--gpus-per-task``). Raises UserError where no device is left for this rank: two ranks on one device would share
    its memory, and NCCL refuses them.
    """
    if local_rank < devices:
        return local_rank
    if devices == 1 and launcher not in _ALL_DEVICES_VISIBLE:
        return 0
    raise UserError(
        f"rank {local_rank} (counted from 0) of {socket.gethostname()} has no device of its own: {devices} are visible "
        f"there; start at most {devices} ranks per host, or make more devices visible (CUDA_VISIBLE_DEVICES)"
    )


@contextmanager
def joined_mesh(
    layout: ParallelLayout,
    rank: int,
    *,
    device: torch.device,
    timeout: datetime.timedelta,
    placement: Placement | None = None,
    store: Store | None = None,
) -> Iterator[Mesh]:
    """Initialise torch.distributed for `layout`, yield this rank's `Mesh`, and destroy the process groups at the end.

    The ranks meet in `store`, or at MASTER_ADDR and MASTER_PORT. Every operation fails after `timeout`: without it the
    other ranks would wait half an hour for a lost peer. The groups are destroyed because a process that exits with
    live groups may abort.

    Raises UserError where the environment names network interfaces that this host does not have.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    require_interfaces(os.environ, backend)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        keep_freed_memory()
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=layout.world_size,
        timeout=timeout,
        store=store,
    )
    yield build_mesh(layout, rank, device=device, timeout=timeout, placement=placement)
    # Not after an exception: the closed sockets would kill the peers first, and their errors would be reported.
    dist.destroy_process_group()


def build_mesh(
    layout: ParallelLayout,
    rank: int,
    *,
    device: torch.device,
    timeout: datetime.timedelta,
    placement: Placement | None = None,
) -> Mesh:
    """Form the process groups of a layout, after torch.distributed was initialised. Collective.

    `placement` says which pipeline rank holds which stages; without it each pipeline rank holds one stage.
    """
    placement = placement or Placement(layout.size("pipeline"))
    groups = _Groups(layout, rank, device)
    axes = {axis.name: groups.along(axis.name) for axis in layout.axes}
    undivided = [name for name in layout.names_of("gradient") if name not in layout.names_of("shard")]
    return Mesh(
        layout=layout,
        placement=placement,
        rank=rank,
        device=device,
        axes=axes,
        tensor=TensorGroup(axes["tensor"].rank, axes["tensor"].size, axes["tensor"].process_group),
        batch=groups.of("batch"),
        gradient=groups.of("gradient"),
        shard=groups.of("shard"),
        shard_replicas=groups.along(*undivided) if undivided else None,
        loss=groups.of("loss"),
        model=groups.of("model"),
        embedding=_embedding_group(layout, placement, rank, timeout),
        embedding_replicas=_embedding_replicas_group(layout, placement, rank, timeout),
        links=_stage_links(layout, placement, rank, device, timeout),
    )


class _Groups:
    """Forms this rank's groups along axes, one process group for each set of ranks. All ranks ask in the same order."""

    def __init__(self, layout: ParallelLayout, rank: int, device: torch.device) -> None:
        self._layout, self._rank = layout, rank
        names = tuple(axis.name for axis in layout.axes)
        self._device_mesh = init_device_mesh(device.type, layout.sizes, mesh_dim_names=names)
        self._formed: dict[tuple[str, ...], dist.ProcessGroup] = {}

    def of(self, meaning: Meaning) -> Group:
        return self.along(*self._layout.names_of(meaning))

    def along(self, *names: str) -> Group:
        """Return the group along some axes, in the layout's order."""
        layout = self._layout
        # An axis of one rank adds no ranks to a group.
        long = tuple(name for name in names if layout.size(name) > 1) or names[:1]
        if long not in self._formed:
            mesh = self._device_mesh[long]
            self._formed[long] = (mesh if len(long) == 1 else mesh._flatten("_".join(long))).get_group()
        return Group(layout.index(self._rank, *names), layout.size(*names), self._formed[long])


def _embedding_group(
    layout: ParallelLayout, placement: Placement, rank: int, timeout: datetime.timedelta
) -> dist.ProcessGroup | None:
    ends = _first_and_last(placement)
    if ends is None:
        return None
    mine = None
    for ranks in layout.groups("pipeline"):
        mine = _new_group([ranks[end] for end in ends], rank, timeout, "embedding") or mine
    return mine


def _embedding_replicas_group(
    layout: ParallelLayout, placement: Placement, rank: int, timeout: datetime.timedelta
) -> dist.ProcessGroup | None:
    ends = _first_and_last(placement)
    if ends is None or layout.group_size("gradient") < 3:
        return None
    mine = None
    for ranks in layout.groups("pipeline", *layout.names_of("gradient")):
        members = [member for member in ranks if layout.coordinate(member)["pipeline"] in ends]
        mine = _new_group(members, rank, timeout, "replicas") or mine
    return mine


def _first_and_last(placement: Placement) -> tuple[int, int] | None:
    """Return the pipeline ranks of the first and the last stage; None where one rank holds both."""
    first, last = placement.rank_of(0), placement.rank_of(placement.num_stages - 1)
    return None if first == last else (first, last)


def _stage_links(
    layout: ParallelLayout, placement: Placement, rank: int, device: torch.device, timeout: datetime.timedelta
) -> Links:
    incoming: dict[tuple[MessageKind, int], Link] = {}
    outgoing: dict[tuple[MessageKind, int], Link] = {}
    for ranks in layout.groups("pipeline"):
        for source, target, kind in _hops(placement):
            name = f"{kind} {ranks[source]}>{ranks[target]}"
            group = _new_group([ranks[source], ranks[target]], rank, timeout, name)
            if group is not None and rank == ranks[source]:
                outgoing[kind, target] = Link(ranks[target], group)
            elif group is not None:
                incoming[kind, source] = Link(ranks[source], group)
    links = Links(incoming, outgoing)
    for source, target, kind in _hops(placement):
        _connect(links, layout.coordinate(rank)["pipeline"], source, target, kind, device)
    return links


def _connect(links: Links, here: int, source: int, target: int, kind: MessageKind, device: torch.device) -> None:
    """Send a first message over a link, so that NCCL connects its two ranks.

    NCCL connects two ranks at their first message, which both wait for. All ranks call this in the same order, so that
    they cannot wait for each other in a circle, as they could with the first messages of a schedule.
    """
    message = torch.zeros(1, device=device)
    if here == source:
        link = links.outgoing[kind, target]
        dist.send(message, link.peer, group=link.group)
    elif here == target:
        link = links.incoming[kind, source]
        dist.recv(message, link.peer, group=link.group)


def _hops(placement: Placement) -> list[tuple[int, int, MessageKind]]:
    """Return (source, target, kind) of every link between pipeline ranks, in the same order on all ranks."""
    hops: dict[tuple[int, int, MessageKind], None] = {}
    for stage in range(placement.num_stages - 1):
        lower, upper = placement.rank_of(stage), placement.rank_of(stage + 1)
        if lower != upper:
            hops[lower, upper, "activation"] = None
            hops[upper, lower, "gradient"] = None
    return list(hops)


def _new_group(ranks: list[int], rank: int, timeout: datetime.timedelta, name: str) -> dist.ProcessGroup | None:
    """Form a group; return None on ranks outside it. All ranks of the world call it for every group, in the same order.

    torch can form a group by a call of its members alone, but then derives the group's name from the number of groups
    that a rank has formed, and members with different numbers wait for each other for ever.
    """
    group = dist.new_group(ranks, timeout=timeout, group_desc=name)
    return cast(dist.ProcessGroup, group) if rank in ranks else None
