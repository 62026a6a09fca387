"""Process groups of a mesh against the layout's arithmetic, and messages over its links."""

from datetime import timedelta
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed

from megalite.errors import CommonError, UserError
from megalite.parallel.json_collectives import broadcast_json, gather_json, on_rank_zero
from megalite.parallel.layout import DATA, PIPELINE, TENSOR, Axis, Meaning, ParallelLayout
from megalite.parallel.mesh import build_mesh, device_index
from megalite.parallel.placement import Placement
from megalite.pipeline.p2p import Channel
from megalite.pipeline.stage_io import TensorSpec
from megalite.zero.mpu import ModelParallelUnit

CPU = torch.device("cpu")
MEANINGS: tuple[Meaning, ...] = get_args(Meaning)
REPLICA = Axis("replica", frozenset({"batch", "gradient", "loss"}))


def group_members(layout: ParallelLayout, placement: Placement | None = None) -> dict[str, list[int] | None]:
    """The members of every group by its name, and of every link by what it carries and where its other end is."""
    timeout = timedelta(seconds=60)
    mesh = build_mesh(layout, dist.get_rank(), device=CPU, timeout=timeout, placement=placement)
    unit = ModelParallelUnit(mesh)
    assert unit.get_data_parallel_rank() == layout.index(mesh.rank, *layout.names_of("shard"))
    assert unit.get_model_parallel_world_size() == layout.size("tensor", "pipeline")
    groups = {name: getattr(mesh, name) for name in (*MEANINGS, "shard_replicas")} | dict(mesh.axes)
    members = {"embedding": mesh.embedding, "embedding_replicas": mesh.embedding_replicas}
    shared: dict[tuple[int, ...], set[int]] = {}
    for name, group in groups.items():
        members[name] = group and group.process_group
        if group is not None:
            assert (group.rank, group.size) == (dist.get_rank(members[name]), dist.get_world_size(members[name]))
        if group is not None and group.size > 1:
            shared.setdefault(tuple(dist.get_process_group_ranks(members[name])), set()).add(id(members[name]))
    assert all(len(groups) == 1 for groups in shared.values()), "two process groups of the same ranks"
    assert mesh.tensor.process_group is mesh.axes["tensor"].process_group
    links = {f"{kind} from {peer}": link.group for (kind, peer), link in mesh.links.incoming.items()}
    links |= {f"{kind} to {peer}": link.group for (kind, peer), link in mesh.links.outgoing.items()}
    assert len({id(group) for group in links.values()}) == len(links), "two directions share a communicator"
    return {name: group and dist.get_process_group_ranks(group) for name, group in (members | links).items()}


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(tensor=2, pipeline=2, data=2),
        ParallelLayout(tensor=1, pipeline=4, data=1),
        ParallelLayout(tensor=1, pipeline=3, data=3),
        ParallelLayout(tensor=1, pipeline=2, data=2, axes=(PIPELINE, REPLICA, DATA, TENSOR), replica=2),
    ],
    ids=str,
)
def test_groups_are_those_of_the_layout(layout: ParallelLayout) -> None:
    axes = {name: layout.names_of(name) for name in MEANINGS} | {name: (name,) for name in layout.names}
    copies = layout.group_size("gradient")
    for rank, found in enumerate(run_distributed(group_members, layout.world_size, layout)):
        for name, along in axes.items():
            assert found[name] == list(next(group for group in layout.groups(*along) if rank in group))
        pipeline = next(group for group in layout.groups("pipeline") if rank in group)
        ends = [pipeline[0], pipeline[-1]]
        assert found["embedding"] == (ends if rank in ends else None)
        plane = next(group for group in layout.groups("pipeline", *axes["gradient"]) if rank in group)
        last = layout.size("pipeline") - 1
        embedding_replicas = [one for one in plane if layout.coordinate(one)["pipeline"] in (0, last)]
        assert found["embedding_replicas"] == (
            embedding_replicas if copies > 2 and rank in embedding_replicas else None
        )
        replicas = layout.groups("replica") if "replica" in layout.names else ()
        assert found["shard_replicas"] == next((list(group) for group in replicas if rank in group), None)
        place = pipeline.index(rank)
        before, after = pipeline[place - 1 : place + 1], pipeline[place : place + 2]
        expected = {f"activation from {place - 1}": before, f"gradient to {place - 1}": before} if place else {}
        if rank != pipeline[-1]:
            expected |= {f"activation to {place + 1}": after, f"gradient from {place + 1}": after}
        assert {name: tuple(ranks or ()) for name, ranks in found.items() if " " in name} == expected


def test_a_loop_links_its_ends_and_a_v_turns_on_the_last_rank() -> None:
    layout = ParallelLayout(tensor=1, pipeline=3, data=1)
    loop = run_distributed(group_members, 3, layout, Placement(3, 2))
    assert [ranks["embedding"] for ranks in loop] == [[0, 2], None, [0, 2]]
    v = run_distributed(group_members, 3, layout, Placement(3, 2, "v"))
    assert [ranks["embedding"] for ranks in v] == [None, None, None], "one rank holds the first stage and the last"

    def links(ranks: dict[str, list[int] | None]) -> list[str]:
        return sorted(name for name in ranks if " " in name)

    both_ways = ["activation from {0}", "activation to {0}", "gradient from {0}", "gradient to {0}"]
    assert links(v[0]) == [name.format(1) for name in both_ways]
    assert links(v[2]) == [name.format(1) for name in both_ways]
    assert links(v[1]) == sorted(name.format(peer) for name in both_ways for peer in (0, 2))
    onwards = ["activation from {0}", "activation to {1}", "gradient from {1}", "gradient to {0}"]
    for rank, ranks in enumerate(loop):
        assert links(ranks) == sorted(name.format((rank - 1) % 3, (rank + 1) % 3) for name in onwards)


def exchange() -> list[float]:
    layout = ParallelLayout(tensor=1, pipeline=2, data=1)
    mesh = build_mesh(layout, dist.get_rank(), device=CPU, timeout=timedelta(seconds=60))
    links, first = mesh.links, mesh.has_first_stage
    edge = {"x": TensorSpec((2, 3), torch.float32), "y": TensorSpec((4,), torch.int64)}
    incoming = Channel(links.incoming["gradient" if first else "activation", 1 - mesh.rank], CPU)
    outgoing = Channel(links.outgoing["activation" if first else "gradient", 1 - mesh.rank], CPU)
    receives = [incoming.receive(edge) for _ in range(4)]
    for number in range(4):
        # The order of the tensors is that of the edge.
        outgoing.send({"y": torch.full((4,), number), "x": torch.full((2, 3), 10.0 * mesh.rank + number)}, edge)
    received = [receive.wait() for receive in receives]
    assert [float(tensors["y"].float().mean()) for tensors in received] == [0.0, 1.0, 2.0, 3.0]
    outgoing.flush()
    x, y = torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64)
    for wrong in ({"x": x.T, "y": y}, {"x": x.bfloat16(), "y": y}, {"x": x}, {"x": x, "z": y}):
        with pytest.raises(ValueError, match="the link carries"):
            outgoing.send(wrong, edge)
    return [float(tensors["x"].mean()) for tensors in received]


def test_messages_of_both_directions_arrive_in_order() -> None:
    assert run_distributed(exchange, 2) == [[10.0, 11.0, 12.0, 13.0], [0.0, 1.0, 2.0, 3.0]]


def gather() -> list[object]:
    layout = ParallelLayout(tensor=1, pipeline=1, data=3)
    mesh = build_mesh(layout, dist.get_rank(), device=CPU, timeout=timedelta(seconds=60))
    return gather_json({"rank": mesh.rank, "text": "é" * 10 * mesh.rank}, mesh)


def test_json_is_gathered_in_the_order_of_ranks() -> None:
    expected = [{"rank": rank, "text": "é" * 10 * rank} for rank in range(3)]
    assert run_distributed(gather, 3) == [expected] * 3


def asked_of_rank_zero(layout: ParallelLayout) -> list[object]:
    """What every rank hears of rank 0's answers: one that each would give otherwise, nothing, and a refusal."""
    rank = dist.get_rank()
    mesh = build_mesh(layout, rank, device=CPU, timeout=timedelta(seconds=60))
    asked = []

    def refuse() -> None:
        asked.append(rank)
        raise UserError(f"rank {rank} refuses")

    heard: list[object] = [broadcast_json({"rank": rank}, mesh), on_rank_zero(lambda: [rank, "é" * (100 - rank)], mesh)]
    heard.append(on_rank_zero(lambda: None, mesh))
    try:
        on_rank_zero(refuse, mesh)
    except CommonError as error:
        heard.append(str(error))
    return [*heard, asked]


def test_what_rank_zero_finds_all_ranks_have_found() -> None:
    ranks = run_distributed(asked_of_rank_zero, 3, ParallelLayout(tensor=1, pipeline=1, data=3))
    for rank, heard in enumerate(ranks):
        assert heard == [{"rank": 0}, [0, "é" * 100], None, "rank 0 refuses", [] if rank else [0]]


@pytest.mark.parametrize(
    ("local_rank", "devices", "launcher", "index"),
    [
        (0, 1, "megalite", 0),
        (3, 4, "torchrun", 3),
        (7, 8, None, 7),
        (3, 1, "slurm", 0),  # each task sees a device of its own
        (2, 1, "openmpi", 0),
        (5, 1, None, 0),
        (4, 4, "slurm", None),
        (7, 4, "torchrun", None),
        (1, 1, "megalite", None),
        (1, 1, "deepspeed", None),
        (5, 4, None, None),
    ],
)
def test_no_two_ranks_share_a_device(local_rank: int, devices: int, launcher: str | None, index: int | None) -> None:
    if index is not None:
        assert device_index(local_rank, devices, launcher) == index
        return
    with pytest.raises(UserError, match=f"has no device of its own: {devices} are visible .*at most {devices} ranks"):
        device_index(local_rank, devices, launcher)
