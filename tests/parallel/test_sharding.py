"""Regions of global tensors that ranks hold, and those that flat ranges of their parameters cover: pure arithmetic."""

import doctest
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.parallel import sharding as module
from megalite.parallel.regions import Region
from megalite.parallel.sharding import Position, ShardSpec, global_regions, local_shards, padded_vocabulary

ROWS = {"tensor": 0}


def positions(**sizes: int) -> Iterator[Position]:
    """Every position along axes of the given sizes."""
    for indices in product(*map(range, sizes.values())):
        yield {axis: (index, sizes[axis]) for axis, index in zip(sizes, indices, strict=True)}


@given(st.integers(1, 5000), st.sampled_from([1, 2, 4, 8]))
def test_the_regions_of_a_padded_dim_cover_it_once(vocab_size: int, size: int) -> None:
    padded = padded_vocabulary(vocab_size, size)
    spec = ShardSpec("table", (vocab_size, 3), ROWS, padded)
    slices = [spec.region(at).slices[0] for at in positions(tensor=size)]
    assert [i for part in slices for i in range(part.start, part.stop)] == list(range(vocab_size))
    assert all(spec.local_shape(at) == (padded // size, 3) for at in positions(tensor=size))
    assert all(part.stop - part.start <= padded // size for part in slices)
    assert padded - vocab_size < 64 * size
    assert padded % (64 * size) == 0


@given(
    st.tuples(*[st.integers(0, 2)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.integers(0, 5),
)
def test_shards_along_several_axes_cover_a_tensor_once(
    dims: tuple[int, ...], sizes: tuple[int, ...], shares: tuple[int, ...], padding: int
) -> None:
    """Three axes divide a tensor of three dims, two or three of them perhaps the same dim, and dim 0 may be padded."""
    whole = list(shares)
    for dim, size in zip(dims, sizes, strict=True):
        whole[dim] *= size
    shape = (max(1, whole[0] - padding), *whole[1:])
    spec = ShardSpec("w", shape, dict(zip("abc", dims, strict=True)), whole[0])
    seen = np.zeros(shape, int)
    for at in positions(**dict(zip("abc", sizes, strict=True))):
        assert spec.local_shape(at) == shares
        seen[spec.region(at).slices] += 1
    assert (seen == 1).all()


def test_the_first_axis_of_a_dim_cuts_it_coarsest() -> None:
    spec = ShardSpec("w", (8,), {"expert": 0, "tensor": 0})
    found = [spec.region(at).offset[0] for at in positions(expert=2, tensor=2)]
    assert found == [0, 2, 4, 6]
    swapped = ShardSpec("w", (8,), {"tensor": 0, "expert": 0})
    assert [swapped.region(at).offset[0] for at in positions(expert=2, tensor=2)] == [0, 4, 2, 6]


def test_fused_parts_are_stacked_in_order() -> None:
    specs = [ShardSpec("q", (8, 3), ROWS), ShardSpec("k", (4, 3), ROWS), ShardSpec("v", (4, 3), ROWS)]
    placed = list(local_shards(specs, {"tensor": (1, 2)}))
    assert [shard.source for shard in placed] == [
        Region((4, 0), (4, 3)),
        Region((2, 0), (2, 3)),
        Region((2, 0), (2, 3)),
    ]
    assert [shard.target.offset[0] for shard in placed] == [0, 4, 6]
    assert all(shard.target.shape == shard.source.shape for shard in placed)


def test_a_replicated_tensor_is_whole_everywhere() -> None:
    spec = ShardSpec("norm.weight", (5,))
    at = {"tensor": (3, 4), "data": (1, 2)}
    assert spec.region(at) == Region.whole((5,))
    assert spec.local_shape(at) == (5,)


def test_an_axis_that_a_position_leaves_out_has_one_rank() -> None:
    spec = ShardSpec("experts.up", (4, 6), {"expert": 0, "tensor": 1})
    assert spec.region({"tensor": (1, 2)}) == Region((0, 3), (4, 3))
    assert spec.region({}) == Region.whole((4, 6))


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks do not divide dim 0"):
        ShardSpec("w", (8, 8), ROWS).region({"tensor": (0, 3)})
    with pytest.raises(ValueError, match="4 ranks do not divide dim 1"):
        ShardSpec("w", (8, 6), {"expert": 1, "tensor": 1}).local_shape({"expert": (0, 2), "tensor": (0, 2)})


@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.integers(1, 5),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from(["fused", "vocabulary", "by columns", "two axes"]),
    st.data(),
)
def test_every_element_of_a_flat_range_is_found_in_its_global_tensor(
    tensor: int, expert: int, columns: int, parts: list[int], kind: str, data: st.DataObject
) -> None:
    """Fused parameters of several tensors, a vocabulary whose padding is nowhere, and two axes that cut two dims."""
    specs = {
        "fused": [ShardSpec(f"part{number}", (4 * rows, columns), ROWS) for number, rows in enumerate(parts)],
        "vocabulary": [ShardSpec("vocabulary", (10, columns), ROWS, 16)],
        "by columns": [ShardSpec("by columns", (3, 4 * columns), {"tensor": 1})],
        "two axes": [
            ShardSpec(f"{n}", (2 * n, 4 * columns), {"expert": 0, "tensor": 1}) for n, _ in enumerate(parts, 1)
        ],
    }[kind]
    world = {
        spec.name: 1000 * number + np.arange(np.prod(spec.global_shape)).reshape(spec.global_shape)
        for number, spec in enumerate(specs)
    }
    for at in positions(expert=expert, tensor=tensor):
        placed = list(local_shards(specs, at))
        shapes = [spec.local_shape(at) for spec in specs]
        local = np.full((sum(rows for rows, _ in shapes), shapes[0][1]), -1)
        for shard in placed:
            local[shard.target.slices] = world[shard.spec.name][shard.source.slices]
        start = data.draw(st.integers(0, local.size))
        stop = data.draw(st.integers(start, local.size))
        found = np.full(stop - start, -1)
        for flat in global_regions(placed, local.shape, start, stop):
            found[flat.start : flat.start + flat.region.numel] = world[flat.name][flat.region.slices].ravel()
        np.testing.assert_array_equal(found, local.ravel()[start:stop])


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0
