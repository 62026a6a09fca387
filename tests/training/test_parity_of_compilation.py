"""Compiled layers train as one process of plain torch does (helpers/parity.py)."""

from pathlib import Path

import pytest
from parity import check_parity

from megalite.model import compilation
from megalite.planning.plan import Plan

PACKED = ("data.reset_attention_mask=true", "data.reset_position_ids=true")


def without_kernels(plan: Plan) -> Plan:
    """Have the rank run the compiled graphs by torch's own kernels, without a C++ compiler."""
    assert plan.config.train.compile
    compilation.BACKEND = "aot_eager"
    return plan


@pytest.mark.parametrize(
    ("layout", "stage", "overrides"),
    [((2, 1, 2), 1, ("parallel.sequence_parallel=true",)), ((1, 2, 1), 2, ("train.recompute=full",))],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_compiled_layers_train_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], stage: int, overrides: tuple[str, ...]
) -> None:
    given = ("train.compile=true", f"deepspeed.zero_optimization.stage={stage}", *overrides)
    model = ("model.hidden_dropout=0.1", *PACKED)
    check_parity(run_file, corpus, layout, *given, tied=True, model=model, replan=without_kernels)
