"""Parameter groups and frozen parameters: every layout trains them as one process of plain torch does."""

from functools import cache
from pathlib import Path

import pytest
from harness import run_distributed
from resuming import at, size
from training import Trace, resized, train_in_plain_torch, train_rank

Layout = tuple[int, int, int]
SIZES = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 509}
TOLERANCE = 1e-5

TIED, UNTIED = "model.tie_word_embeddings=true", "model.tie_word_embeddings=false"
ADAMW = "name: adamw, lr: 2.0e-3, betas: [0.9, 0.95], weight_decay: 0.1"
LION = "name: lion, lr: 5.0e-4, betas: [0.9, 0.95], weight_decay: 0.5"


def optimizer(*groups: str, settings: str = ADAMW) -> str:
    return f"train.optimizer={{{settings}, groups: [{', '.join(f'{{{group}}}' for group in groups)}]}}"


def frozen(*patterns: str) -> str:
    return optimizer(*(f"match: '{pattern}', frozen: true" for pattern in patterns))


BLOCK = frozen("layers.1.*")
FIRST_HALF = frozen("embedding.*", "layers.[01].*")
LAST_HALF = frozen("layers.[23].*", "final_norm.weight", "head.weight")
MIDDLE = frozen("layers.[12].*")
TABLE = frozen("embedding.tokens.weight")
NORMS = optimizer("match: '*norm.weight', lr_scale: 3.0", "match: '*', frozen: true")
RATES = optimizer(
    "match: 'layers.0.attention.*', lr_scale: 0.1, weight_decay: 0.0",
    "match: 'layers.[01].*', lr_scale: 2.0",
    "match: embedding.tokens.weight, weight_decay: 0.5",
)


@cache
def reference(corpus: Path, content: str, overrides: tuple[str, ...]) -> Trace:
    path = corpus.parent / "groups.yaml"
    path.write_text(content)
    return train_in_plain_torch(path, [*overrides, f"run.dir={corpus.parent}"])


def check(run_file: Path, corpus: Path, layout: Layout, stage: int, shared: tuple[str, ...], *own: str) -> None:
    """Train at `layout` with `shared` and `own` settings, and in one process with `shared` alone."""
    resized(run_file, **SIZES)
    expected = reference(corpus, run_file.read_text().replace(str(run_file.parent), ""), shared)
    traces = run_distributed(train_rank, size(layout), str(run_file), (*shared, *at(layout, stage), *own))
    for losses, norms in traces:
        Trace(losses, norms).assert_close(expected, TOLERANCE)
    assert expected.losses[-1] < expected.losses[0], "nothing was learned"


QUICK = [
    *[((2, 1, 1), 1, (BLOCK, TIED)), ((1, 1, 2), 1, (BLOCK, TIED)), ((1, 1, 2), 2, (BLOCK, TIED))],
    *[((1, 1, 2), 3, (BLOCK, TIED)), ((1, 2, 1), 0, (FIRST_HALF, UNTIED)), ((1, 2, 1), 3, (FIRST_HALF, UNTIED))],
    *[((1, 2, 1), 1, (LAST_HALF, UNTIED)), ((1, 2, 2), 2, (TABLE, TIED)), ((2, 1, 2), 3, (NORMS, UNTIED))],
]
FROZEN = [
    *QUICK,
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in [
            *[((1, 2, 1), 0, (BLOCK, TIED)), ((2, 2, 1), 3, (BLOCK, TIED)), ((1, 4, 1), 2, (MIDDLE, TIED))],
            *[((1, 2, 1), stage, (FIRST_HALF, UNTIED)) for stage in (1, 2)],
            *[((1, 2, 1), stage, (LAST_HALF, UNTIED)) for stage in (0, 2, 3)],
            *[((1, 2, 2), 3, (TABLE, TIED)), ((2, 1, 1), 0, (NORMS, TIED)), ((1, 2, 2), 1, (NORMS, UNTIED))],
        ]
    ),
]


@pytest.mark.parametrize(("layout", "stage", "shared"), FROZEN, ids=lambda x: str(x).replace(" ", "")[:60])
def test_frozen_parameters_train_like_one_process(
    run_file: Path, corpus: Path, layout: Layout, stage: int, shared: tuple[str, ...]
) -> None:
    check(run_file, corpus, layout, stage, shared)


ZB_V = ("parallel.schedule=zb_v", "parallel.virtual_stages=2")
INTERLEAVED = ("parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2")
PARTITIONED = "deepspeed.activation_checkpointing={partition_activations: true, cpu_checkpointing: true}"


@pytest.mark.parametrize(
    ("layout", "own"),
    [
        pytest.param((1, 2, 1), ("parallel.schedule=zb_h1",), marks=pytest.mark.full),
        ((1, 2, 1), ZB_V),
        pytest.param((1, 2, 1), INTERLEAVED, marks=pytest.mark.full),
        ((2, 2, 1), ("parallel.sequence_parallel=true", "train.recompute=full")),
        pytest.param((2, 2, 1), (PARTITIONED,), marks=pytest.mark.full),
    ],
    ids=["zb_h1", "zb_v", "interleaved", "divided tokens, recomputed", "recomputed, divided"],
)
def test_a_frozen_first_stage_goes_with_every_schedule(
    run_file: Path, corpus: Path, layout: Layout, own: tuple[str, ...]
) -> None:
    check(run_file, corpus, layout, 2, (FIRST_HALF, UNTIED), *own)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.full)])
def test_offload_trains_frozen_parameters_like_one_process(run_file: Path, corpus: Path, stage: int) -> None:
    offload = "deepspeed.zero_optimization.offload_optimizer={device: cpu}"
    check(run_file, corpus, (1, 2, 2), stage, (FIRST_HALF, UNTIED), offload)


FURTHER = [pytest.param(*case, marks=pytest.mark.full) for case in (((1, 2, 2), 1), ((1, 4, 1), 2))]


@pytest.mark.parametrize(("layout", "stage"), [((2, 2, 1), 0), ((1, 2, 2), 3), *FURTHER], ids=str)
def test_groups_have_their_own_rate_and_decay(run_file: Path, corpus: Path, layout: Layout, stage: int) -> None:
    check(run_file, corpus, layout, stage, (RATES, TIED))


@pytest.mark.parametrize(("layout", "stage"), [((2, 2, 1), 0), ((1, 1, 2), 3)], ids=str)
def test_lion_trains_like_one_process(run_file: Path, corpus: Path, layout: Layout, stage: int) -> None:
    check(run_file, corpus, layout, stage, (optimizer(settings=LION), TIED))
