"""Layout invariance: every layout and ZeRO stage trains as one process of plain torch does.

Ten steps of the quickstart's model in fp32, with grouped-query heads, clipping active and several microbatches a
step. Losses and gradient norms agree to 1e-5, relative.
"""

from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations, product
from pathlib import Path

import pytest
from harness import run_distributed
from replicas import divided_replicas, whole_replicas
from training import Trace, resized, train_in_plain_torch, train_rank, unchanged

from megalite.training.plan import Plan

SIZES = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 509}
"""Of the model here, whose heads and layers are the quickstart's: a vocabulary that no ranks divide is padded."""
FASTER = "train.optimizer.lr=2.0e-3"
"""A narrow model takes larger steps to learn something in ten."""
TOLERANCE = 1e-5
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2), (2, 2, 2), (1, 4, 1)]


@cache
def reference(corpus: Path, content: str, overrides: tuple[str, ...]) -> Trace:
    path = corpus.parent / "reference.yaml"
    path.write_text(content)
    return train_in_plain_torch(path, [*overrides, f"run.dir={corpus.parent}"])


def check(
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


# Every pair of an axis' size, tied or not, and a ZeRO stage is in one of these; `full` has every combination.
QUICK = [
    *[((2, 1, 1), True, 0), ((1, 1, 2), False, 1), ((2, 1, 2), True, 2), ((2, 1, 2), False, 3)],
    *[((1, 2, 2), False, 0), ((2, 2, 1), True, 1), ((2, 2, 1), False, 2), ((2, 2, 2), True, 3)],
    *[((1, 4, 1), True, 0), ((1, 4, 1), False, 1), ((1, 2, 2), True, 2), ((1, 4, 1), False, 3)],
    *[((1, 4, 1), True, 2), ((1, 1, 1), True, 2), ((1, 1, 1), False, 3)],
]
EVERY = [
    pytest.param(layout, tied, stage, marks=() if (layout, tied, stage) in QUICK else pytest.mark.full)
    for layout, tied, stage in product(LAYOUTS, (True, False), (0, 1, 2, 3))
]


def test_the_quick_cells_have_every_pair_of_values() -> None:
    def pairs(cells: Iterable[tuple[tuple[int, int, int], bool, int]]) -> set[object]:
        return {pair for layout, *rest in cells for pair in combinations(enumerate((*layout, *rest)), 2)}

    assert pairs(product(LAYOUTS, (True, False), (0, 1, 2, 3))) == pairs(QUICK)


@pytest.mark.parametrize(("layout", "tied", "stage"), EVERY, ids=lambda x: str(x).replace(" ", ""))
def test_every_layout_and_zero_stage_trains_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], tied: bool, stage: int
) -> None:
    check(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", tied=tied)


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
    check(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", tied=tied, replan=replan)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_stages_may_have_different_numbers_of_sub_groups(run_file: Path, corpus: Path, offload: str) -> None:
    zero = f"{{stage: 3, sub_group_size: 20000, offload_optimizer: {{device: {offload}}}}}"
    given = (f"deepspeed.zero_optimization={zero}", "parallel.stage_layers=[3, 1]")
    check(run_file, corpus, (1, 2, 1), *given, tied=False)


@pytest.mark.parametrize(
    "layout",
    [pytest.param((1, 2, 1), marks=pytest.mark.full), (1, 4, 1), pytest.param((2, 2, 2), marks=pytest.mark.full)],
    ids=lambda layout: "x".join(map(str, layout)),
)
def test_gpipe_trains_like_one_process(run_file: Path, corpus: Path, layout: tuple[int, int, int]) -> None:
    check(run_file, corpus, layout, "parallel.schedule=gpipe", tied=True)


SCHEDULES = {
    "interleaved": ("parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2"),
    "zb_h1": ("parallel.schedule=zb_h1",),
    "zb_v": ("parallel.schedule=zb_v", "parallel.virtual_stages=2"),
}


QUICK_SCHEDULES = {("interleaved", True, 3), ("zb_h1", True, 1), ("zb_v", True, 2), ("zb_v", True, 3)}


@pytest.mark.parametrize(
    ("schedule", "tied", "stage"),
    [
        pytest.param(*case, marks=() if case in QUICK_SCHEDULES else pytest.mark.full)
        for case in product(SCHEDULES, (True, False), (0, 1, 2, 3))
    ],
)
def test_every_schedule_trains_like_one_process(
    run_file: Path, corpus: Path, schedule: str, tied: bool, stage: int
) -> None:
    zero = f"deepspeed.zero_optimization.stage={stage}"
    check(run_file, corpus, (1, 2, 1), zero, *SCHEDULES[schedule], tied=tied)


def test_a_schedule_composes_with_tensor_parallelism(run_file: Path, corpus: Path) -> None:
    check(run_file, corpus, (2, 2, 1), "deepspeed.zero_optimization.stage=2", *SCHEDULES["zb_h1"], tied=True)


@pytest.mark.full
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_composes_with_tensor_and_data_parallelism(
    run_file: Path, corpus: Path, schedule: tuple[str, ...]
) -> None:
    check(run_file, corpus, (2, 2, 2), "deepspeed.zero_optimization.stage=3", *schedule, tied=True)


def test_fused_attention_trains_like_one_process(run_file: Path, corpus: Path) -> None:
    check(run_file, corpus, (2, 2, 1), tied=True, model=("train.cpu_attention=fused",))


def test_uneven_stages_train_like_one_process(run_file: Path, corpus: Path) -> None:
    check(run_file, corpus, (1, 2, 1), "parallel.stage_layers=[3, 1]", tied=True)


OFFLOADS = {
    "optimizer, ZeRO-1": (1, "deepspeed.zero_optimization.offload_optimizer={device: cpu}"),
    "optimizer, ZeRO-2": (2, "deepspeed.zero_optimization.offload_optimizer={device: cpu}"),
    "optimizer, ZeRO-3": (3, "deepspeed.zero_optimization.offload_optimizer={device: cpu}"),
    "parameters, ZeRO-3": (3, "deepspeed.zero_optimization.offload_param={device: cpu}"),
}


@pytest.mark.parametrize(("stage", "offload"), OFFLOADS.values(), ids=OFFLOADS.keys())
def test_offload_trains_like_one_process(run_file: Path, corpus: Path, stage: int, offload: str) -> None:
    check(run_file, corpus, (1, 2, 2), f"deepspeed.zero_optimization.stage={stage}", offload, tied=True)


GPT2 = (
    "model={architecture: gpt2, vocab_size: 509, hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 8,"
    " max_position_embeddings: 256}"
)


@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2)], ids=lambda layout: "x".join(map(str, layout)))
def test_gpt2_trains_like_one_process(run_file: Path, corpus: Path, layout: tuple[int, int, int]) -> None:
    check(run_file, corpus, layout, tied=True, model=(GPT2,))


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_every_layout_trains_gpt2_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], tied: bool, stage: int
) -> None:
    check(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", tied=tied, model=(GPT2,))


NEOX = GPT2.replace("gpt2", "gpt_neox")
# Positions trained on so few that of a head's 16 rates some stay, some are slowed and some are between.
LLAMA3 = (
    "{rope_type: llama3, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0,"
    " original_max_position_embeddings: 128}"
)
FAMILIES = {
    "normed heads": ("model.qk_norm=true",),
    "normed heads, 1 kv head": ("model.qk_norm=true", "model.num_key_value_heads=1"),
    "llama 3 positions": (f"model.rope_scaling={LLAMA3}",),
    "positions over 4": ("model.rope_scaling={rope_type: linear, factor: 4.0}",),
    "gpt_neox": (NEOX,),
    "gpt_neox, in turn": (NEOX, "model.use_parallel_residual=false", "model.hidden_act=gelu_tanh"),
}
QUICK_FAMILIES = {name: FAMILIES[name] for name in ("normed heads, 1 kv head", "llama 3 positions", "gpt_neox")}


@pytest.mark.parametrize("model", QUICK_FAMILIES.values(), ids=QUICK_FAMILIES.keys())
def test_every_family_trains_like_one_process(run_file: Path, corpus: Path, model: tuple[str, ...]) -> None:
    check(run_file, corpus, (2, 2, 1), tied=False, model=model)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2), (2, 2, 2)], ids=lambda layout: "x".join(map(str, layout)))
def test_every_layout_trains_every_family_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], model: tuple[str, ...], stage: int
) -> None:
    check(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", tied=False, model=model)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2), (2, 2, 2)], ids=lambda layout: "x".join(map(str, layout)))
def test_twenty_steps_of_one_key_value_head_train_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], stage: int
) -> None:
    model = ("model.num_key_value_heads=1", "train.steps=20", "train.global_batch_size=8")
    check(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", tied=True, model=model)


DIVIDED = "parallel.sequence_parallel=true"
DIVIDED_LAYOUTS = [(2, 1, 1), (2, 2, 1), (2, 1, 2)]
DIVIDED_FAMILIES = {"llama": (), "gpt2": (GPT2,), "gpt_neox": (NEOX,), **QUICK_FAMILIES}


@pytest.mark.parametrize(
    ("layout", "stage", "family"),
    [
        ((2, 1, 1), 0, "gpt2"),
        ((2, 2, 1), 0, "llama"),
        ((2, 2, 1), 1, "gpt_neox"),
        ((2, 1, 2), 2, "normed heads, 1 kv head"),
        ((2, 2, 1), 3, "gpt2"),
    ],
)
def test_divided_tokens_train_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], stage: int, family: str
) -> None:
    zero = f"deepspeed.zero_optimization.stage={stage}"
    tied = family not in QUICK_FAMILIES  # as the tests above have them, whose references serve here too
    check(run_file, corpus, layout, zero, DIVIDED, tied=tied, model=DIVIDED_FAMILIES[family])


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", DIVIDED_FAMILIES.values(), ids=DIVIDED_FAMILIES.keys())
@pytest.mark.parametrize(
    "layout", [*DIVIDED_LAYOUTS, (2, 2, 2), (4, 1, 1)], ids=lambda layout: "x".join(map(str, layout))
)
def test_every_layout_trains_divided_tokens_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], model: tuple[str, ...], stage: int
) -> None:
    check(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", DIVIDED, tied=False, model=model)


DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")
RECOMPUTED = {
    "kept": (),
    "selective": ("train.recompute=selective",),
    "full": ("train.recompute=full",),
    "full, one in two": ("train.recompute=full", "train.recompute_every=2"),
    "full, divided": ("deepspeed.activation_checkpointing={partition_activations: true, cpu_checkpointing: true}",),
    "full, two at once": ("deepspeed.pipeline={activation_checkpoint_interval: 2}",),
}
QUICK_RECOMPUTED = [
    ((1, 1, 1), 1, "kept"),
    ((2, 1, 1), 0, "full, divided"),
    ((1, 2, 1), 2, "selective"),
    ((1, 1, 2), 3, "full"),
    ((2, 2, 1), 1, "kept"),
    ((1, 2, 2), 3, "full, two at once"),
]


@pytest.mark.parametrize(("layout", "stage", "recompute"), QUICK_RECOMPUTED, ids=lambda x: str(x).replace(" ", ""))
def test_dropout_and_recomputing_train_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], stage: int, recompute: str
) -> None:
    overrides = (f"deepspeed.zero_optimization.stage={stage}", *RECOMPUTED[recompute])
    check(run_file, corpus, layout, *overrides, tied=True, model=DROPOUT)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize(
    "layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)], ids=lambda layout: "x".join(map(str, layout))
)
def test_every_layout_trains_with_dropout_and_recomputing_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], recompute: str, stage: int
) -> None:
    model = (*DROPOUT, "train.micro_batch_size=1", "data.reset_attention_mask=true", "data.reset_position_ids=true")
    overrides = (f"deepspeed.zero_optimization.stage={stage}", *RECOMPUTED[recompute])
    check(run_file, corpus, layout, *overrides, tied=True, model=model)
