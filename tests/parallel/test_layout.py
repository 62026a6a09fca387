"""Ranks and coordinates: pure arithmetic."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.parallel import layout as module
from megalite.parallel.layout import AXES, Axis, ParallelLayout

layouts = st.builds(ParallelLayout, tensor=st.integers(1, 5), pipeline=st.integers(1, 5), data=st.integers(1, 5))


@given(layouts)
def test_rank_and_coordinate_are_each_others_inverse(layout: ParallelLayout) -> None:
    assert [layout.rank(at) for at in layout.coordinates()] == list(range(layout.world_size))


@given(layouts, st.sets(st.sampled_from(AXES)))
def test_groups_part_the_ranks_and_differ_along_their_axes_only(layout: ParallelLayout, axes: set[Axis]) -> None:
    groups = layout.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        places = [layout.coordinate(rank) for rank in group]
        for axis in AXES:
            wanted = layout.size(axis) if axis in axes else 1
            assert len({getattr(at, axis) for at in places}) == wanted


def test_tensor_neighbours_are_neighbouring_ranks() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    assert layout.groups("tensor") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("pipeline") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.groups("pipeline", "tensor") == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0


def test_a_rank_outside_the_grid_and_an_empty_axis_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 4 is not in 0\.\.3"):
        ParallelLayout(tensor=2, pipeline=2, data=1).coordinate(4)
    with pytest.raises(ValueError, match="the data axis"):
        ParallelLayout(tensor=2, pipeline=2, data=0)
