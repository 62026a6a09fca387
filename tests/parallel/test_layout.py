"""Ranks and coordinates: pure arithmetic."""

import doctest
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.parallel import layout as module
from megalite.parallel.layout import AXES, DATA, PIPELINE, TENSOR, Axis, Meaning, ParallelLayout

REPLICA = Axis("replica", frozenset({"batch", "gradient", "loss"}))
CONTEXT = Axis("context", frozenset({"gradient", "shard", "loss"}))
FIVE = (PIPELINE, REPLICA, DATA, CONTEXT, TENSOR)
sizes = st.integers(1, 4)
layouts = st.one_of(
    st.builds(ParallelLayout, tensor=sizes, pipeline=sizes, data=sizes),
    st.builds(ParallelLayout, *[sizes] * 3, axes=st.just(FIVE), replica=sizes, context=sizes),
)


@given(layouts)
def test_each_rank_has_a_coordinate_of_its_own_in_the_order_of_the_axes(layout: ParallelLayout) -> None:
    places = [tuple(layout.coordinate(rank).values()) for rank in range(layout.world_size)]
    assert places == list(product(*map(range, layout.sizes)))
    assert [layout.index(rank, *layout.names) for rank in range(layout.world_size)] == list(range(layout.world_size))


@given(layouts, st.sets(st.sampled_from([axis.name for axis in AXES])))
def test_groups_part_the_ranks_and_differ_along_their_axes_only(layout: ParallelLayout, axes: set[str]) -> None:
    groups = layout.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        places = [layout.coordinate(rank) for rank in group]
        assert len(group) == layout.size(*axes)
        assert [layout.index(rank, *axes) for rank in group] == list(range(len(group)))
        for axis in layout.names:
            wanted = layout.size(axis) if axis in axes else 1
            assert len({at[axis] for at in places}) == wanted


def test_tensor_neighbours_are_neighbouring_ranks() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    assert layout.groups("tensor") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("pipeline") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.groups("pipeline", "tensor") == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_groups_by_meaning_follow_from_what_the_axes_declare() -> None:
    layout = ParallelLayout(tensor=2, pipeline=1, data=2, axes=FIVE, replica=2, context=2)
    assert {meaning: layout.names_of(meaning) for meaning in ("batch", "gradient", "shard", "loss", "model")} == {
        "batch": ("replica", "data"),
        "gradient": ("replica", "data", "context"),
        "shard": ("data", "context"),
        "loss": ("replica", "data", "context"),
        "model": ("pipeline", "tensor"),
    }
    assert layout.group_size("gradient") == 8
    assert layout.groups_by("model") == tuple((rank, rank + 1) for rank in range(0, 16, 2))
    assert layout.groups_by("batch")[0] == (0, 4, 8, 12)
    # A copy of the model is as many ranks as there are, over the ranks that hold the same of it.
    assert layout.group_size("model") * layout.group_size("gradient") == layout.world_size
    assert str(layout) == "tensor 2 x pipeline 1 x context 2 x data 2 x replica 2"
    assert str(layout.resized(context=3)) == "tensor 1 x pipeline 1 x context 3 x data 1 x replica 1"


@pytest.mark.parametrize(
    ("meanings", "reason"),
    [
        ({"model", "gradient"}, "divides the model or repeats it"),
        ({"batch", "loss"}, "divides the model or repeats it"),
        ({"model", "shard"}, "no meaning beside 'model'"),
        ({"gradient", "batch"}, "read different samples: give it 'loss' too"),
    ],
)
def test_an_axis_whose_meanings_do_not_fit_is_refused(meanings: set[Meaning], reason: str) -> None:
    with pytest.raises(ValueError, match=f"the new axis .*{reason}|along the new axis {reason}"):
        Axis("new", frozenset(meanings))


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0


def test_a_rank_outside_the_grid_and_an_empty_axis_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 4 is not in 0\.\.3"):
        ParallelLayout(tensor=2, pipeline=2, data=1).coordinate(4)
    with pytest.raises(ValueError, match="the data axis"):
        ParallelLayout(tensor=2, pipeline=2, data=0)
    with pytest.raises(ValueError, match="has no replica axis: its axes are pipeline, data, tensor"):
        ParallelLayout(replica=2)
    with pytest.raises(ValueError, match="no axis of pipeline, replica, tensor has the meaning 'shard'"):
        ParallelLayout(axes=(PIPELINE, REPLICA, TENSOR))
