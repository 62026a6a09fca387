"""Parity: training at a layout beside one process of plain torch, ten steps of the quickstart's model in fp32.

The model has grouped-query heads, clipping is active, and a step has several microbatches. Losses and gradient norms
agree to a relative difference of 1e-5.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from harness import run_distributed
from training import Trace, resized, train_in_plain_torch, train_rank, unchanged

from megalite.planning.plan import Plan

SIZES = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 509}
"""Of the model here, whose heads and layers are the quickstart's: a vocabulary that no ranks divide is padded."""
FASTER = "train.optimizer.lr=2.0e-3"
"""A narrow model takes larger steps to learn something in ten."""
TOLERANCE = 1e-5
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2), (2, 2, 2), (1, 4, 1)]
"""Sizes of the tensor, pipeline and data axes."""
# Every pair of an axis' size, tied or not, and a ZeRO stage is in one of these; `full` has every combination.
QUICK = [
    *[((2, 1, 1), True, 0), ((1, 1, 2), False, 1), ((2, 1, 2), True, 2), ((2, 1, 2), False, 3)],
    *[((1, 2, 2), False, 0), ((2, 2, 1), True, 1), ((2, 2, 1), False, 2), ((2, 2, 2), True, 3)],
    *[((1, 4, 1), True, 0), ((1, 4, 1), False, 1), ((1, 2, 2), True, 2), ((1, 4, 1), False, 3)],
    *[((1, 4, 1), True, 2), ((1, 1, 1), True, 2), ((1, 1, 1), False, 3)],
]
CELLS = [
    pytest.param(layout, tied, stage, marks=() if (layout, tied, stage) in QUICK else pytest.mark.full)
    for layout, tied, stage in product(LAYOUTS, (True, False), (0, 1, 2, 3))
]
"""Layout, whether the table is tied, and ZeRO stage: every combination, most of them marked `full`."""


@cache
def reference(corpus: Path, content: str, overrides: tuple[str, ...]) -> Trace:
    path = corpus.parent / "reference.yaml"
    path.write_text(content)
    return train_in_plain_torch(path, [*overrides, f"run.dir={corpus.parent}"])


def check_parity(
    run_file: Path,
    corpus: Path,
    layout: tuple[int, int, int],
    *overrides: str,
    tied: bool,
    model: tuple[str, ...] = (),
    replan: Callable[[Plan], Plan] = unchanged,
) -> None:
    """Train at `layout` with `overrides`, and in one process; `model` is what both share."""
    tensor, pipeline, data = layout
    resized(run_file, **SIZES)
    shared = (FASTER, *model, f"model.tie_word_embeddings={str(tied).lower()}")
    expected = reference(corpus, run_file.read_text().replace(str(run_file.parent), ""), shared)
    traces = run_distributed(
        train_rank,
        tensor * pipeline * data,
        str(run_file),
        (
            *shared,
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.data={data}",
            *overrides,
        ),
        replan,
    )
    for losses, norms in traces:
        Trace(losses, norms).assert_close(expected, TOLERANCE)
    assert max(expected.norms) > 0.5, "clipping was never active"
    assert expected.losses[-1] < expected.losses[0] - 0.15, "nothing was learned"
