"""Process groups of a grid against the layout's arithmetic, and messages over its links."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed

from megalite.distributed import Link, ModelParallelUnit, build_grid, gather_json
from megalite.layout import Axis, ParallelLayout
from megalite.pipeline.p2p import Channel

CPU = torch.device("cpu")


def group_members(layout: ParallelLayout) -> dict[str, list[int] | None]:
    grid = build_grid(layout, dist.get_rank(), device=CPU, timeout=timedelta(seconds=60))
    unit = ModelParallelUnit(grid)
    assert unit.get_data_parallel_rank() == grid.coordinate.data
    assert unit.get_model_parallel_world_size() == layout.tensor * layout.pipeline
    assert dist.get_rank(grid.model) == unit.get_model_parallel_rank()
    members = {
        "tensor": grid.tensor.process_group,
        "data": grid.data,
        "pipeline": grid.pipeline,
        "model": grid.model,
        "embedding": grid.embedding,
    }
    links = {
        end: link.group
        for end in ("activation_in", "activation_out", "gradient_in", "gradient_out")
        if (link := getattr(grid.links, end))
    }
    assert len({id(group) for group in links.values()}) == len(links), "two directions share a communicator"
    return {name: group and dist.get_process_group_ranks(group) for name, group in (members | links).items()}


@pytest.mark.parametrize(
    "layout", [ParallelLayout(tensor=2, pipeline=2, data=2), ParallelLayout(tensor=1, pipeline=4, data=1)], ids=str
)
def test_groups_are_those_of_the_layout(layout: ParallelLayout) -> None:
    axes: dict[str, tuple[Axis, ...]] = {
        "tensor": ("tensor",),
        "data": ("data",),
        "pipeline": ("pipeline",),
        "model": ("pipeline", "tensor"),
    }
    for rank, found in enumerate(run_distributed(group_members, layout.world_size, layout)):
        for name, along in axes.items():
            assert found[name] == list(next(group for group in layout.groups(*along) if rank in group))
        pipeline = next(group for group in layout.groups("pipeline") if rank in group)
        ends = [pipeline[0], pipeline[-1]]
        assert found["embedding"] == (ends if rank in ends else None)
        place = pipeline.index(rank)
        assert found.get("activation_in") == (list(pipeline[place - 1 : place + 1]) if place else None)
        assert found.get("gradient_in") == (list(pipeline[place : place + 2]) if rank != pipeline[-1] else None)


def exchange() -> list[float]:
    layout = ParallelLayout(tensor=1, pipeline=2, data=1)
    grid = build_grid(layout, dist.get_rank(), device=CPU, timeout=timedelta(seconds=60))
    shape, links = (2, 3), grid.links

    def channel(link: Link | None) -> Channel:
        assert link is not None
        return Channel(link, shape, torch.float32, CPU)

    incoming = channel(links.gradient_in if grid.is_first_stage else links.activation_in)
    outgoing = channel(links.activation_out if grid.is_first_stage else links.gradient_out)
    receives = [incoming.receive() for _ in range(4)]
    for number in range(4):
        outgoing.send(torch.full(shape, 10.0 * grid.rank + number))
    found = [float(receive.wait().mean()) for receive in receives]
    outgoing.flush()
    with pytest.raises(ValueError, match="the link carries"):
        outgoing.send(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="the link carries"):
        outgoing.send(torch.zeros(shape, dtype=torch.bfloat16))
    return found


def test_messages_of_both_directions_arrive_in_order() -> None:
    assert run_distributed(exchange, 2) == [[10.0, 11.0, 12.0, 13.0], [0.0, 1.0, 2.0, 3.0]]


def gather() -> list[object]:
    layout = ParallelLayout(tensor=1, pipeline=1, data=3)
    grid = build_grid(layout, dist.get_rank(), device=CPU, timeout=timedelta(seconds=60))
    return gather_json({"rank": grid.rank, "text": "é" * 10 * grid.rank}, grid)


def test_json_is_gathered_in_the_order_of_ranks() -> None:
    expected = [{"rank": rank, "text": "é" * 10 * rank} for rank in range(3)]
    assert run_distributed(gather, 3) == [expected] * 3
