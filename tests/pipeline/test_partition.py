import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.pipeline.partition import partition


@settings(deadline=None)
@given(st.data(), st.integers(1, 200))
def test_every_layer_has_one_stage_and_the_shares_are_even(data: st.DataObject, num_layers: int) -> None:
    num_stages = data.draw(st.integers(1, num_layers))
    stages = partition(num_layers, num_stages)
    assert len(stages) == num_stages
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(st.data(), st.integers(1, 200))
def test_layers_left_over_go_to_the_middle_and_to_the_last_stage_last(data: st.DataObject, num_layers: int) -> None:
    num_stages = data.draw(st.integers(1, num_layers))
    sizes = [len(stage) for stage in partition(num_layers, num_stages)]
    longer = [stage for stage, size in enumerate(sizes) if size > min(sizes)]
    first = (num_stages - len(longer)) // 2
    assert longer == list(range(first, first + len(longer)))


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "sizes"),
    [(4, 2, [2, 2]), (5, 2, [3, 2]), (7, 3, [2, 3, 2]), (8, 3, [3, 3, 2]), (10, 4, [2, 3, 3, 2]), (3, 3, [1, 1, 1])],
)
def test_even_partition_by_example(num_layers: int, num_stages: int, sizes: list[int]) -> None:
    assert [len(stage) for stage in partition(num_layers, num_stages)] == sizes


def test_stage_layers_are_taken_as_given() -> None:
    assert partition(6, 3, (1, 3, 2)) == (range(1), range(1, 4), range(4, 6))


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "stage_layers", "message"),
    [
        (2, 3, None, "2 layers cannot be split over 3 stages; use 1 to 2"),
        (2, 0, None, "2 layers cannot be split over 0 stages"),
        (6, 3, (3, 3), "one number for each of the 3 stages"),
        (6, 3, (3, 3, 3), "adds up to 9, not to the model's 6 layers"),
        (6, 3, (3, 3, 0), "every stage needs at least one layer"),
        (6, 3, (4, 3, -1), "every stage needs at least one layer"),
    ],
)
def test_what_cannot_be_is_refused(num_layers: int, num_stages: int, stage_layers, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(num_layers, num_stages, stage_layers)
