"""Flat ranges of tensors, as ZeRO cuts them, are regions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megalite.parallel.regions import Region, flat_range_regions


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
