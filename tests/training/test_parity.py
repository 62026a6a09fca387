"""Layout invariance: every layout and ZeRO stage trains as one process of plain torch does (helpers/parity.py)."""

from collections.abc import Callable, Iterable
from itertools import combinations, product
from pathlib import Path

import pytest
from parity import CELLS, LAYOUTS, QUICK, check_parity
from replicas import divided_replicas, whole_replicas

from megalite.planning.plan import Plan


def test_the_quick_cells_have_every_pair_of_values() -> None:
    def pairs(cells: Iterable[tuple[tuple[int, int, int], bool, int]]) -> set[object]:
        return {pair for layout, *rest in cells for pair in combinations(enumerate((*layout, *rest)), 2)}

    assert pairs(product(LAYOUTS, (True, False), (0, 1, 2, 3))) == pairs(QUICK)


@pytest.mark.parametrize(("layout", "tied", "stage"), CELLS, ids=lambda x: str(x).replace(" ", ""))
def test_every_layout_and_zero_stage_trains_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], tied: bool, stage: int
) -> None:
    check_parity(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", tied=tied)


@pytest.mark.parametrize("replan", [whole_replicas, divided_replicas])
@pytest.mark.parametrize(
    ("layout", "stage", "tied"),
    [
        *[((2, 1, 2), 1, True), ((1, 1, 4), 1, False), ((1, 2, 2), 0, True), ((1, 1, 4), 3, False)],
        *(pytest.param((1, 2, 4), stage, True, marks=pytest.mark.full) for stage in (0, 2, 3)),
    ],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_a_fourth_axis_trains_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], stage: int, tied: bool, replan: Callable[[Plan], Plan]
) -> None:
    """The data axis of `layout` is made two replicas by declaring their axis; nothing else knows of it."""
    check_parity(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", tied=tied, replan=replan)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_stages_may_have_different_numbers_of_sub_groups(run_file: Path, corpus: Path, offload: str) -> None:
    zero = f"{{stage: 3, sub_group_size: 20000, offload_optimizer: {{device: {offload}}}}}"
    given = (f"deepspeed.zero_optimization={zero}", "parallel.stage_layers=[3, 1]")
    check_parity(run_file, corpus, (1, 2, 1), *given, tied=False)


OFFLOADS = {
    "optimizer, ZeRO-1": (1, "deepspeed.zero_optimization.offload_optimizer={device: cpu}"),
    "optimizer, ZeRO-2": (2, "deepspeed.zero_optimization.offload_optimizer={device: cpu}"),
    "optimizer, ZeRO-3": (3, "deepspeed.zero_optimization.offload_optimizer={device: cpu}"),
    "parameters, ZeRO-3": (3, "deepspeed.zero_optimization.offload_param={device: cpu}"),
}


@pytest.mark.parametrize(("stage", "offload"), OFFLOADS.values(), ids=OFFLOADS.keys())
def test_offload_trains_like_one_process(run_file: Path, corpus: Path, stage: int, offload: str) -> None:
    check_parity(run_file, corpus, (1, 2, 2), f"deepspeed.zero_optimization.stage={stage}", offload, tied=True)
