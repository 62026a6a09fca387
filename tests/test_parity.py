"""Layout invariance: every layout and ZeRO stage trains as one process of plain torch does.

Ten steps of the quickstart's model in fp32, with grouped-query heads, clipping active and several microbatches a
step. Losses and gradient norms agree to 1e-5, relative.
"""

from functools import cache
from pathlib import Path

import pytest
from harness import run_distributed
from training import Trace, train_in_plain_torch, train_rank

TOLERANCE = 1e-5
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2), (2, 2, 2), (1, 4, 1)]


@cache
def reference(corpus: Path, tied: bool, content: str) -> Trace:
    path = corpus.parent / f"reference_{tied}.yaml"
    path.write_text(content)
    return train_in_plain_torch(path, [f"model.tie_word_embeddings={str(tied).lower()}", f"run.dir={corpus.parent}"])


def check(run_file: Path, corpus: Path, layout: tuple[int, int, int], *overrides: str, tied: bool) -> None:
    tensor, pipeline, data = layout
    expected = reference(corpus, tied, run_file.read_text().replace(str(run_file.parent), ""))
    traces = run_distributed(
        train_rank,
        tensor * pipeline * data,
        str(run_file),
        (
            f"model.tie_word_embeddings={str(tied).lower()}",
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.data={data}",
            *overrides,
        ),
    )
    for losses, norms in traces:
        Trace(losses, norms).assert_close(expected, TOLERANCE)
    assert max(expected.norms) > 0.5, "clipping was never active"
    assert expected.losses[-1] < expected.losses[0] - 0.3, "nothing was learned"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_every_layout_and_zero_stage_trains_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], tied: bool, stage: int
) -> None:
    check(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", tied=tied)


@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 4, 1), (2, 2, 2)], ids=lambda layout: "x".join(map(str, layout)))
def test_gpipe_trains_like_one_process(run_file: Path, corpus: Path, layout: tuple[int, int, int]) -> None:
    check(run_file, corpus, layout, "parallel.schedule=gpipe", tied=True)


def test_uneven_stages_train_like_one_process(run_file: Path, corpus: Path) -> None:
    check(run_file, corpus, (1, 2, 1), "parallel.stage_layers=[3, 1]", tied=True)
