"""Parameters that two axes divide along two dims are saved, and are loaded on other layouts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megalite.checkpoint import store
from megalite.checkpoint.fragments import Fragment, fill, parts
from megalite.checkpoint.manifest import Manifest
from megalite.checkpoint.reader import CheckpointReader
from megalite.parallel.layout import DATA, PIPELINE, TENSOR, Axis, ParallelLayout
from megalite.parallel.sharding import LocalShard, ShardSpec, local_shards

EXPERT = Axis("expert", frozenset({"batch", "gradient", "loss"}))
SPECS = {
    "up": [
        ShardSpec("up", (4, 12, 5), {"expert": 0, "tensor": 1}),
        ShardSpec("gate", (8, 12, 5), {"expert": 0, "tensor": 1}),
    ],
    "down": [ShardSpec("down", (9, 8), {"tensor": 0, "expert": 1}, padded_rows=12)],
    "rows of both": [ShardSpec("rows", (24, 3), {"expert": 0, "tensor": 0})],
    "router": [ShardSpec("router", (4, 5))],
}
WHOLE = {
    spec.name: 1000.0 * number + np.arange(np.prod(spec.global_shape), dtype=np.float32).reshape(spec.global_shape)
    for number, spec in enumerate(spec for specs in SPECS.values() for spec in specs)
}


def layout(tensor: int, expert: int, data: int) -> ParallelLayout:
    return ParallelLayout(tensor=tensor, data=data, axes=(PIPELINE, EXPERT, DATA, TENSOR), expert=expert)


Fill = Callable[[torch.Tensor, LocalShard], object]


def fragments_of(rank: int, layout: ParallelLayout, set_local: Fill) -> list[Fragment]:
    """The fragments of a rank: of each parameter its shard, flat and cut over the data axis at any element."""
    at = layout.coordinate(rank)
    position = {axis: (index, layout.size(axis)) for axis, index in at.items()}
    found = []
    for specs in SPECS.values():
        shapes = [spec.local_shape(position) for spec in specs]
        shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        local = torch.full(shape, torch.nan)
        shards = tuple(local_shards(specs, position))
        for shard in shards:
            set_local(local[shard.target.slices], shard)
        flat, (index, size) = local.view(-1), position["data"]
        start, stop = len(flat) * index // size, len(flat) * (index + 1) // size
        replicated = [axis for axis in ("expert", "tensor") if axis not in specs[0].sharding]
        copy, copies = layout.index(rank, *replicated), layout.size(*replicated)
        found.append(Fragment(shards, shape, start, {"weight": flat[start:stop]}, copy, copies))
    return found


@pytest.mark.parametrize("saved", [(2, 2, 1), (1, 4, 3), (4, 1, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("loaded", [(2, 2, 3), (4, 2, 1)], ids=str)
def test_what_two_axes_divide_is_loaded_on_another_layout(
    tmp_path: Path, saved: tuple[int, int, int], loaded: tuple[int, int, int]
) -> None:
    folder, before = tmp_path / "step_1", layout(*saved)
    store.begin(folder)
    for rank in range(before.world_size):
        held = fragments_of(
            rank, before, lambda part, shard: part.copy_(torch.from_numpy(WHOLE[shard.spec.name][shard.source.slices]))
        )
        store.write_rank(folder, rank, list(parts(held)))
    store.finish(folder, ranks=before.world_size, manifest=Manifest(1, {}, {}), state={"step": 1})
    reader = CheckpointReader(folder)
    assert {name: tensor.shape for name, tensor in reader.manifest.tensors.items()} == {
        f"weight/{name}": whole.shape for name, whole in WHOLE.items()
    }
    after, views = layout(*loaded), []
    for rank in range(after.world_size):
        of_rank = fragments_of(rank, after, lambda part, shard: views.append((part, shard)))
        fill(of_rank, reader)
    seen = {name: np.zeros(whole.shape, bool) for name, whole in WHOLE.items()}
    for part, shard in views:
        known = ~np.isnan(part.numpy())
        np.testing.assert_array_equal(part.numpy()[known], WHOLE[shard.spec.name][shard.source.slices][known])
        seen[shard.spec.name][shard.source.slices] |= known
    assert all(everywhere.all() for everywhere in seen.values())
