"""Flat ranges of local parameters, as ZeRO cuts them, are regions of global tensors."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megalite.parallel.regions import Region, flat_range_regions, global_regions
from megalite.parallel.sharding import ShardSpec, local_shards


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_flat_range_is_its_regions_in_order(shape: list[int], data: st.DataObject) -> None:
    size = int(np.prod(shape))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    tensor = np.arange(size).reshape(shape)
    regions = list(flat_range_regions(tuple(shape), start, stop))
    assert [int(element) for region in regions for element in tensor[region.slices].ravel()] == list(range(start, stop))
    assert len(regions) <= max(1, 2 * len(shape) - 1)


def test_a_scalar_is_one_region() -> None:
    assert list(flat_range_regions((), 0, 1)) == [Region((), ())]


@given(st.sampled_from([1, 2, 4]), st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_every_element_is_found_in_its_global_tensor(
    tensor_size: int, columns: int, parts: list[int], data: st.DataObject
) -> None:
    """Fused parameters of several tensors, and a vocabulary whose padding is nowhere."""
    specs = [ShardSpec(f"part{number}", (4 * rows, columns), 0) for number, rows in enumerate(parts)]
    if data.draw(st.booleans()):
        specs = [ShardSpec("vocabulary", (10, columns), 0, padded_size=16)]
    if data.draw(st.booleans()):
        specs = [ShardSpec("by columns", (3, 4 * columns), 1)]
    world = {
        spec.name: 1000 * number + np.arange(np.prod(spec.global_shape)).reshape(spec.global_shape)
        for number, spec in enumerate(specs)
    }
    for rank in range(tensor_size):
        placed = list(local_shards(specs, rank, tensor_size))
        local_shape = specs[0].local_shape(tensor_size)
        if specs[0].dim == 0:
            local_shape = (sum(spec.local_shape(tensor_size)[0] for spec in specs), columns)
        local = np.full(local_shape, -1)
        for shard in placed:
            local[shard.target] = world[shard.spec.name][shard.source]
        start = data.draw(st.integers(0, local.size))
        stop = data.draw(st.integers(start, local.size))
        found = np.full(stop - start, -1)
        for flat in global_regions(placed, local_shape, start, stop):
            found[flat.start : flat.start + flat.region.numel] = world[flat.name][flat.region.slices].ravel()
        np.testing.assert_array_equal(found, local.ravel()[start:stop])
