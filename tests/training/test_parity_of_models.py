"""Every model family, with divided tokens too, trains as one process of plain torch does (helpers/parity.py)."""

from pathlib import Path

import pytest
from parity import LAYOUTS, check_parity

GPT2 = (
    "model={architecture: gpt2, vocab_size: 509, hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 8,"
    " max_position_embeddings: 256}"
)


@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2)], ids=lambda layout: "x".join(map(str, layout)))
def test_gpt2_trains_like_one_process(run_file: Path, corpus: Path, layout: tuple[int, int, int]) -> None:
    check_parity(run_file, corpus, layout, tied=True, model=(GPT2,))


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_every_layout_trains_gpt2_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], tied: bool, stage: int
) -> None:
    check_parity(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", tied=tied, model=(GPT2,))


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
    check_parity(run_file, corpus, (2, 2, 1), tied=False, model=model)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2), (2, 2, 2)], ids=lambda layout: "x".join(map(str, layout)))
def test_every_layout_trains_every_family_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], model: tuple[str, ...], stage: int
) -> None:
    check_parity(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", tied=False, model=model)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2), (2, 2, 2)], ids=lambda layout: "x".join(map(str, layout)))
def test_twenty_steps_of_one_key_value_head_train_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], stage: int
) -> None:
    model = ("model.num_key_value_heads=1", "train.steps=20", "train.global_batch_size=8")
    check_parity(run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", tied=True, model=model)


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
    check_parity(run_file, corpus, layout, zero, DIVIDED, tied=tied, model=DIVIDED_FAMILIES[family])


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", DIVIDED_FAMILIES.values(), ids=DIVIDED_FAMILIES.keys())
@pytest.mark.parametrize(
    "layout", [*DIVIDED_LAYOUTS, (2, 2, 2), (4, 1, 1)], ids=lambda layout: "x".join(map(str, layout))
)
def test_every_layout_trains_divided_tokens_like_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], model: tuple[str, ...], stage: int
) -> None:
    check_parity(
        run_file, corpus, layout, f"deepspeed.zero_optimization.stage={stage}", DIVIDED, tied=False, model=model
    )


def test_fused_attention_trains_like_one_process(run_file: Path, corpus: Path) -> None:
    check_parity(run_file, corpus, (2, 2, 1), tied=True, model=("train.cpu_attention=fused",))
