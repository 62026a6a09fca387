"""What goes with what: the page is that of the rules, and what the rules let through trains as one process does."""

from itertools import product
from pathlib import Path
from random import Random

import pytest
from compatibility_page import OTHERS, SCHEDULES, composition_page
from harness import run_distributed
from parity import TOLERANCE, reference
from training import Trace, train_rank

from megalite.errors import UserError
from megalite.planning.plan import prepare

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "composition.md"
SMALL = (
    *("model.num_hidden_layers=8", "model.hidden_size=64", "model.intermediate_size=96", "model.vocab_size=512"),
    *("data.sequence_length=48", "train.global_batch_size=16", "train.micro_batch_size=2", "train.steps=4"),
)
Case = dict[str, tuple[str, ...]]
LAYOUTS = list(product((1, 2), (2, 4), (1, 2)))
MODELS: dict[str, Case] = {
    "dropout": {"kept": (), "dropped": ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")},
    "table": {"untied": ("model.tie_word_embeddings=false",), "tied": ("model.tie_word_embeddings=true",)},
    "targets": {"all": (), "masked": ("data.eod_mask_loss=true",)},
    "rows": {"whole": (), "packed": ("data.reset_attention_mask=true", "data.reset_position_ids=true")},
}
"""What the reference shares, by axis and name."""
RECOMPUTE = "deepspeed.activation_checkpointing="
RUNS: dict[str, Case] = {
    "tokens": {"copied": (), "divided": ("parallel.sequence_parallel=true", "parallel.overlap=true")},
    "recompute": {
        "none": (),
        "selective": ("train.recompute=selective",),
        "full": ("train.recompute=full",),
        "half": ("train.recompute=full", "train.recompute_every=2"),
        "divided": (RECOMPUTE + "{partition_activations: true, cpu_checkpointing: true}",),
        "segments": (RECOMPUTE + "{number_checkpoints: 4}",),
    },
    "offload": {
        "none": (),
        "optimizer": ("deepspeed.zero_optimization.offload_optimizer={device: cpu}",),
        "both": (
            "deepspeed.zero_optimization.offload_optimizer={device: cpu}",
            "deepspeed.zero_optimization.offload_param={device: cpu}",
        ),
    },
}
CHOICES = MODELS | RUNS


def drawn(number: int, tensor: int, stage: int) -> dict[str, str]:
    """The settings of a case by axis, drawn from its number; none that is refused or says nothing."""
    random = Random(3000 + number)  # of the numbers that make every pair below meet, the first of the thousands
    legal = {
        "tokens": ["copied", "divided"][:tensor],
        "offload": {0: ["none"], 3: ["none", "optimizer", "both"]}.get(stage, ["none", "optimizer"]),
    }
    return {axis: random.choice(legal.get(axis, list(settings))) for axis, settings in CHOICES.items()}


CASES = [
    (schedule.name, layout, stage, drawn(number, layout[0], stage))
    for number, (schedule, layout, stage) in enumerate(product(SCHEDULES, LAYOUTS, range(4)))
]
QUICK = [(4, 2), pytest.param(2, 3, marks=pytest.mark.full), (3, 1), (0, 0)]
"""A schedule and a ZeRO stage each, at tensor 2 x pipeline 2 x data 1."""


def test_the_page_is_that_of_the_rules() -> None:
    hint = "make it anew: python tools/compatibility_page.py > docs/reference/composition.md"
    assert PAGE.read_text() == composition_page(), hint
    assert len(OTHERS) > 10


def test_every_setting_meets_every_schedule_and_stage() -> None:
    """Among the drawn cases, where it is legal: what the matrix below proves. What is legal, the next test asks."""
    for axis, settings in CHOICES.items():
        met = {(schedule, choice[axis]) for schedule, _, _, choice in CASES}
        assert met == set(product((schedule.name for schedule in SCHEDULES), settings)), axis
        stages = {(stage, choice[axis]) for _, _, stage, choice in CASES}
        assert len(stages) == (4 * len(settings) if axis != "offload" else 8), axis
    for (axis, settings), (other, others) in product(CHOICES.items(), repeat=2):
        if axis < other:
            together = {(choice[axis], choice[other]) for _, _, _, choice in CASES}
            assert together == set(product(settings, others)), (axis, other)


def words(schedule: str, layout: tuple[int, int, int], stage: int, choice: dict[str, str]) -> tuple[str, ...]:
    """The overrides of a case."""
    keys = next(feature.keys for feature in SCHEDULES if feature.name == schedule)
    return (
        *SMALL,
        *(word for axis, settings in CHOICES.items() for word in settings[choice[axis]]),
        *(f"parallel.{axis}={size}" for axis, size in zip(("tensor", "pipeline", "data"), layout, strict=True)),
        *(f"{key}={value}" for key, value in keys.items()),
        f"deepspeed.zero_optimization.stage={stage}",
    )


def is_refused(run_file: Path, overrides: tuple[str, ...]) -> bool:
    try:
        prepare(run_file, overrides, None)
    except UserError:
        return True
    return False


def test_the_cases_are_those_that_the_rules_let_through(run_file: Path) -> None:
    """None is refused, and where `drawn` leaves a way of offloading out, the rules refuse it."""
    for schedule, layout, stage, choice in CASES:
        assert not is_refused(run_file, words(schedule, layout, stage, choice)), (schedule, layout, stage, choice)
    for stage, offload in product(range(4), CHOICES["offload"]):
        _, layout, _, choice = next(case for case in CASES if case[2] == stage)
        left_out = all(case[3]["offload"] != offload for case in CASES if case[2] == stage)
        assert is_refused(run_file, words("1f1b", layout, stage, choice | {"offload": offload})) == left_out


ELSEWHERE = {
    "optimizer on NVMe": "runs nowhere, as the page says",
    "a growing batch": "tests/full/test_data_parity.py",
    "uneven stages": "tests/training/test_parity_of_schedules.py",
    "checkpoints": "tests/training/test_resume.py",
    "compiled layers": "tests/training/test_parity_of_compilation.py",
}
"""What the cases leave out, and who holds it against one process."""


def test_every_feature_of_the_page_is_in_a_case() -> None:
    """A row that is added to the page, which says that these tests hold it, is missing here until they do."""
    said = {word for case in CASES for word in words(*case)}
    for feature in OTHERS:
        settings = [f"{key}={value}" for key, value in feature.keys.items() if not key.endswith(".stage")]
        held = all(setting in said or any(setting_is_in(setting, word) for word in said) for setting in settings)
        assert held == (feature.name not in ELSEWHERE), feature.name


def setting_is_in(setting: str, word: str) -> bool:
    """Whether a word sets a key of a section to what a setting does, whatever its number is."""
    key, _, value = setting.partition("=")
    section, _, name = key.rpartition(".")
    return word.startswith(f"{section}={{") and f"{name}: {value}" in word


def check(
    run_file: Path, corpus: Path, schedule: str, layout: tuple[int, int, int], stage: int, choice: dict[str, str]
) -> None:
    model = (*SMALL, *(word for axis, settings in MODELS.items() for word in settings[choice[axis]]))
    expected = reference(corpus, run_file.read_text().replace(str(run_file.parent), ""), model)
    tensor, pipeline, data = layout
    traces = run_distributed(
        train_rank, tensor * pipeline * data, str(run_file), words(schedule, layout, stage, choice), timeout=240
    )
    for losses, norms in traces:
        Trace(losses, norms).assert_close(expected, TOLERANCE)
    assert max(expected.norms) > 0.5, "clipping was never active"


@pytest.mark.parametrize(("schedule", "stage"), QUICK)
def test_what_goes_together_trains_like_one_process(run_file: Path, corpus: Path, schedule: int, stage: int) -> None:
    choice = drawn(schedule, 2, stage) | {"tokens": "divided", "dropout": "dropped"}
    check(run_file, corpus, SCHEDULES[schedule].name, (2, 2, 1), stage, choice)


@pytest.mark.full
@pytest.mark.parametrize(("schedule", "layout", "stage", "choice"), CASES)
def test_all_that_goes_together_trains_like_one_process(
    run_file: Path, corpus: Path, schedule: str, layout: tuple[int, int, int], stage: int, choice: dict[str, str]
) -> None:
    check(run_file, corpus, schedule, layout, stage, choice)
