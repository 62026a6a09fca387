"""From a layout and a launch environment to the process groups of a rank: the device mesh and its links.

Every group comes from one torch DeviceMesh of shape (pipeline, data, tensor). The links between neighbouring stages
are groups of their own, two ranks each: NCCL runs the operations of a communicator first in, first out and knows no
tags, so messages of different directions or kinds must not share one.
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megalite.errors import UserError
from megalite.parallel.cpu_memory import keep_freed_memory
from megalite.parallel.layout import Coordinate, ParallelLayout
from megalite.parallel.network_interfaces import require_interfaces
from megalite.parallel.placement import Kind, Placement
from megalite.parallel.tensor_group import TensorGroup


@dataclass(frozen=True, slots=True)
class Link:
    """A one-way connection between this rank and `peer`, a global rank, on a communicator of its own."""

    peer: int
    group: dist.ProcessGroup


@dataclass(frozen=True, slots=True)
class Links:
    """The ends of links at one rank, by what they carry and by the pipeline rank at the other end."""

    incoming: Mapping[tuple[Kind, int], Link]
    outgoing: Mapping[tuple[Kind, int], Link]


@dataclass(frozen=True, slots=True)
class ProcessGrid:
    """This rank's place in the grid and the process groups it is a member of.

    `model` spans tensor x pipeline: the ranks that hold one copy of the model together. `embedding` joins the ranks of
    the first and the last stage, which both hold a tied token table; None on other ranks, and where one rank has both.
    `replicas` joins the `embedding` ranks of all data coordinates, all of whom hold the same share of that table; None
    also where there are fewer than three data coordinates, whose sums come out alike in any order.
    """

    layout: ParallelLayout
    placement: Placement
    rank: int
    device: torch.device
    mesh: DeviceMesh
    tensor: TensorGroup
    data: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    model: dist.ProcessGroup
    embedding: dist.ProcessGroup | None
    replicas: dist.ProcessGroup | None
    links: Links

    @property
    def coordinate(self) -> Coordinate:
        return self.layout.coordinate(self.rank)

    @property
    def stages(self) -> tuple[int, ...]:
        """The pipeline stages that this rank holds."""
        return self.placement.stages_of(self.coordinate.pipeline)

    @property
    def tied_copies_may_part(self) -> bool:
        """Whether a tied table, where there is one, has two copies whose sums over the data axis the order decides.

        The same on every rank.
        """
        return _first_and_last(self.placement) is not None and self.layout.data > 2

    @property
    def has_first_stage(self) -> bool:
        return 0 in self.stages

    @property
    def has_last_stage(self) -> bool:
        return self.placement.num_stages - 1 in self.stages


_SHOWING_ALL = frozenset({"megalite", "torchrun", "deepspeed"})
"""Launchers that show every rank all devices of its host."""


def local_device(local_rank: int, launcher: str | None = None) -> torch.device:
    """Return the accelerator of this rank, or the CPU where there is none; `launcher` is who started it, if known.

    Raises UserError where this rank would share a device with another one.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", device_index(local_rank, torch.cuda.device_count(), launcher))
    return torch.device("cpu")


def device_index(local_rank: int, devices: int, launcher: str | None = None) -> int:
    """Return which of the devices that a rank sees is its own: that of its number on the host, or the only one where
    the launcher may have shown it no other (Slurm's ``--gpus-per-task``).

    Raises UserError where there is none: two ranks on one device have half its memory, and NCCL refuses them.
    """
    if local_rank < devices:
        return local_rank
    if devices == 1 and launcher not in _SHOWING_ALL:
        return 0
    raise UserError(
        f"rank {local_rank} (counted from 0) of {socket.gethostname()} has no device of its own: {devices} are visible "
        f"there; start at most {devices} ranks a host, or make more devices visible (CUDA_VISIBLE_DEVICES)"
    )


@contextmanager
def process_grid(
    layout: ParallelLayout,
    rank: int,
    *,
    device: torch.device,
    timeout: datetime.timedelta,
    placement: Placement | None = None,
    store: Store | None = None,
) -> Iterator[ProcessGrid]:
    """Join the ranks of `layout` and leave them at the end; they meet in `store`, or where MASTER_ADDR and MASTER_PORT
    say.

    Every operation fails after `timeout`: without it a lost peer would strand the others for half an hour. Leaving
    matters: a process that ends well with its groups alive may abort.

    Raises UserError where the environment names network interfaces that this host has not.
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
    yield build_grid(layout, rank, device=device, timeout=timeout, placement=placement)
    # Not where an exception passes: closed sockets would kill the peers first, and they would be blamed.
    dist.destroy_process_group()


def build_grid(
    layout: ParallelLayout,
    rank: int,
    *,
    device: torch.device,
    timeout: datetime.timedelta,
    placement: Placement | None = None,
) -> ProcessGrid:
    """Form the groups of a layout inside an initialised process group. Collective: every rank calls it.

    `placement` says which pipeline rank holds which stages; one stage a rank unless given.
    """
    placement = placement or Placement(layout.pipeline)
    mesh = init_device_mesh(
        device.type,
        (layout.pipeline, layout.data, layout.tensor),
        mesh_dim_names=("pipeline", "data", "tensor"),
    )
    at = layout.coordinate(rank)
    return ProcessGrid(
        layout=layout,
        placement=placement,
        rank=rank,
        device=device,
        mesh=mesh,
        tensor=TensorGroup(at.tensor, layout.tensor, mesh.get_group("tensor")),
        data=mesh.get_group("data"),
        pipeline=mesh.get_group("pipeline"),
        model=mesh["pipeline", "tensor"]._flatten("model").get_group(),
        embedding=_embedding_group(layout, placement, rank, timeout),
        replicas=_replicas_group(layout, placement, rank, timeout),
        links=_stage_links(layout, placement, rank, device, timeout),
    )


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


def _replicas_group(
    layout: ParallelLayout, placement: Placement, rank: int, timeout: datetime.timedelta
) -> dist.ProcessGroup | None:
    ends = _first_and_last(placement)
    if ends is None or layout.data < 3:
        return None
    mine = None
    for ranks in layout.groups("pipeline", "data"):
        members = [member for member in ranks if layout.coordinate(member).pipeline in ends]
        mine = _new_group(members, rank, timeout, "replicas") or mine
    return mine


def _first_and_last(placement: Placement) -> tuple[int, int] | None:
    """The pipeline ranks of the first and the last stage; None where one rank has both."""
    first, last = placement.rank_of(0), placement.rank_of(placement.num_stages - 1)
    return None if first == last else (first, last)


def _stage_links(
    layout: ParallelLayout, placement: Placement, rank: int, device: torch.device, timeout: datetime.timedelta
) -> Links:
    incoming: dict[tuple[Kind, int], Link] = {}
    outgoing: dict[tuple[Kind, int], Link] = {}
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
        _connect(links, layout.coordinate(rank).pipeline, source, target, kind, device)
    return links


def _connect(links: Links, here: int, source: int, target: int, kind: Kind, device: torch.device) -> None:
    """Send a first message over a link. NCCL connects two ranks at their first message, and both wait for it: in an
    order that all ranks share nobody waits in a ring, as they might in the order of a schedule."""
    message = torch.zeros(1, device=device)
    if here == source:
        link = links.outgoing[kind, target]
        dist.send(message, link.peer, group=link.group)
    elif here == target:
        link = links.incoming[kind, source]
        dist.recv(message, link.peer, group=link.group)


def _hops(placement: Placement) -> list[tuple[int, int, Kind]]:
    """What goes from one pipeline rank to another, each pair once, in an order that all ranks share."""
    hops: dict[tuple[int, int, Kind], None] = {}
    for stage in range(placement.num_stages - 1):
        lower, upper = placement.rank_of(stage), placement.rank_of(stage + 1)
        if lower != upper:
            hops[lower, upper, "activation"] = None
            hops[upper, lower, "gradient"] = None
    return list(hops)


def _new_group(ranks: list[int], rank: int, timeout: datetime.timedelta, name: str) -> dist.ProcessGroup | None:
    """Form a group; None on ranks outside it. Every rank of the world calls it for every group, in one order: torch
    can also form a group by its members alone, but then names it by how many groups a rank has, and ranks that have
    different numbers wait for each other in vain."""
    group = dist.new_group(ranks, timeout=timeout, group_desc=name)
    return cast(dist.ProcessGroup, group) if rank in ranks else None
