import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.parallel.placement import Placement

LOOPS = st.builds(Placement, st.integers(1, 9), st.integers(1, 5))
VS = st.builds(Placement, st.integers(1, 9), st.just(2), st.just("v"))


@given(LOOPS | VS)
def test_every_rank_holds_its_share_and_every_stage_one_rank(placement: Placement) -> None:
    held = [placement.stages_of(rank) for rank in range(placement.num_ranks)]
    assert sorted(stage for stages in held for stage in stages) == list(range(placement.num_stages))
    for rank, stages in enumerate(held):
        assert len(stages) == placement.virtual_stages
        assert list(stages) == sorted(stages)
        assert {placement.rank_of(stage) for stage in stages} == {rank}


@given(LOOPS)
def test_a_loop_goes_around_the_ranks(placement: Placement) -> None:
    p = placement.num_ranks
    for stage in range(placement.num_stages - 1):
        assert placement.rank_of(stage + 1) == (placement.rank_of(stage) + 1) % p
        assert placement.crosses(stage, stage + 1) == (p > 1)


@given(VS)
def test_a_v_goes_down_and_back_up_and_turns_on_the_last_rank(placement: Placement) -> None:
    p = placement.num_ranks
    assert [placement.rank_of(stage) for stage in range(2 * p)] == [*range(p), *reversed(range(p))]
    assert [s for s in range(2 * p - 1) if not placement.crosses(s, s + 1)] == [p - 1]


def test_what_cannot_be_is_refused() -> None:
    for sizes in ((0, 1), (1, 0), (-2, 1)):
        with pytest.raises(ValueError, match="one rank and one stage"):
            Placement(*sizes)
    for virtual_stages in (1, 3):
        with pytest.raises(ValueError, match=f"two virtual stages, not {virtual_stages}"):
            Placement(4, virtual_stages, "v")
    for stage in (-1, 8):
        with pytest.raises(ValueError, match=rf"stage {stage} is not in 0\.\.7"):
            Placement(4, 2).rank_of(stage)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=rf"rank {rank} is not in 0\.\.3"):
            Placement(4, 2).stages_of(rank)
