"""The run file: what it resolves to, and the exact words for everything that can be wrong with it."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megalite.config import Recompute, RunConfig, TrainSection, load_run_config, read_model, suggestions
from megalite.errors import UserError
from megalite.model.families.gpt_neox.config import GPTNeoXConfig
from megalite.model.families.llama.config import LlamaConfig
from megalite.parallel.layout import ParallelLayout
from megalite.paths import escape

ROOT = Path(__file__).parents[2]
ABSENT = object()

BASE: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {
        "architecture": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 688,
        "max_position_embeddings": 512,
    },
    "data": {"sequence_length": 256, "train": [{"prefix": "data/corpus"}]},
    "parallel": {"tensor": 2, "pipeline": 2},
    "train": {"steps": 200, "global_batch_size": 32, "micro_batch_size": 4},
    "deepspeed": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
}


def changed(edits: dict[str, Any]) -> dict[str, Any]:
    """Return BASE with dotted keys set, or taken away by ABSENT."""
    document = copy.deepcopy(BASE)
    for dotted, value in edits.items():
        *sections, last = dotted.split(".")
        node = document
        for section in sections:
            node = node.setdefault(section, {})
        if value is ABSENT:
            del node[last]
        else:
            node[last] = value
    return document


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write BASE with edits, or a text as it is, to run.yaml in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write_run(edits: dict[str, Any] | str | None = None) -> Path:
        text = edits if isinstance(edits, str) else yaml.safe_dump(changed(edits or {}))
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return Path("run.yaml")

    return write_run


def message(path: Path, *overrides: str, world_size: int | None = None, vocab_size: int | None = 8192) -> str:
    with pytest.raises(UserError) as raised:
        load_run_config(path, overrides).resolve(world_size=world_size, vocab_size=vocab_size)
    return str(raised.value)


# ------------------------------------------------------------------------------------------------------- what is right


def test_a_run_resolves_to_a_layout_and_a_batch(write: Callable[..., Path]) -> None:
    config = load_run_config(write()).resolve(world_size=8, vocab_size=8192)
    assert config.layout == ParallelLayout(tensor=2, pipeline=2, data=2)
    assert config.gradient_accumulation_steps == 4
    assert config.model.vocab_size == 8192
    assert (config.precision, config.zero_stage, config.gradient_clipping) == ("bf16", 1, 1.0)
    assert config.source == Path("run.yaml")
    assert config.run.seed == 1234


def test_without_a_launcher_auto_is_one_replica(write: Callable[..., Path]) -> None:
    assert load_run_config(write()).resolve(world_size=None, vocab_size=64).layout.size("data") == 1


def test_the_layout_is_not_known_before_it_is_resolved(write: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="resolve"):
        _ = load_run_config(write()).layout


def test_a_model_fills_in_what_follows(write: Callable[..., Path]) -> None:
    llama = load_run_config(write({"model.num_key_value_heads": None})).model
    assert (llama.num_key_value_heads, llama.head_dim, llama.tie_word_embeddings) == (8, 32, False)
    gpt2 = load_run_config(write({"model.architecture": "gpt2", "model.intermediate_size": ABSENT})).model
    assert (gpt2.intermediate_size, gpt2.tie_word_embeddings) == (1024, True)
    neox = load_run_config(write({"model.architecture": "gpt_neox", "model.intermediate_size": ABSENT})).model
    assert isinstance(neox, GPTNeoXConfig)
    assert (neox.intermediate_size, neox.tie_word_embeddings, neox.rotary_dim) == (1024, False, 8)


def test_fewer_key_value_heads_than_tensor_ranks_are_allowed(write: Callable[..., Path]) -> None:
    path = write({"parallel.tensor": 8, "model.num_key_value_heads": 2})
    assert load_run_config(path).resolve(world_size=16, vocab_size=64).layout.size("tensor") == 8


def test_sources_come_from_a_file_of_weights(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "blend.txt").write_text("# what we have\n30 data/books 7e1\n data/web\n")
    sources = load_run_config(write({"data.train": "blend.txt"})).data.train
    assert [(str(source.prefix), source.weight) for source in sources] == [("data/books", 30.0), ("data/web", 70.0)]


def test_a_prefix_in_the_place_of_a_file_of_weights(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "corpus.idx").touch()
    assert message(write({"data.train": "corpus"})).endswith("; write data.train=[{prefix: corpus}]")


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("data.train=c", "data.train=[{prefix: c}]"),
        ("data.train=some/c.bin", "data.train=[{prefix: some/c}]"),
        ("data.train=[c]", "data.train=[{prefix: c}]"),
        ("data.train=[c, d.idx]", "data.train=[{prefix: c}, {prefix: d}]"),
        ("data.train={path: c}", "data.train=[{prefix: c}]"),
        ("data.train={prefix: c}", "data.train=[{prefix: c}]"),
        ("data.train={prefix: c, weight: 2}", "data.train=[{prefix: c, weight: 2}]"),
        ("data.train=[{path: c, weight: 0.5}]", "data.train=[{prefix: c, weight: 0.5}]"),
        ("data.train=[0.3, c, 0.7, d]", "data.train=[{prefix: c, weight: 0.3}, {prefix: d, weight: 0.7}]"),
        ("data.train={c: 0.3, d: 0.7}", "data.train=[{prefix: c, weight: 0.3}, {prefix: d, weight: 0.7}]"),
        ("data.train='a, b'", "data.train=[{prefix: 'a, b'}]"),
        ("data.valid=c", "data.valid=[{prefix: c}]"),
        ("data.valid={name: web, path: c}", "data.valid=[{prefix: c, name: web}]"),
    ],
)
def test_data_in_another_form_are_told_with_the_right_one(write: Callable[..., Path], override: str, fix: str) -> None:
    told = message(write(), override)
    assert told.startswith(f"command line: {override.partition('=')[0]}=")
    assert told.endswith(f"; write {fix}")
    load_run_config(write(), [fix])


def test_a_text_in_the_place_of_a_dataset_is_told_with_both_steps(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a"}')
    told = message(write(), "data.train=c.jsonl")
    assert "`megalite preprocess c.jsonl --output c`" in told
    assert told.endswith("write data.train=[{prefix: c}]")


@pytest.mark.parametrize("value", ["{path: a, format: b}", "[3]", "[0.5]", "{}", "[{}]", "7"])
def test_data_that_mean_nothing_known_are_told_as_other_values_are(write: Callable[..., Path], value: str) -> None:
    told = message(write(), f"data.train={value}")
    assert told.startswith("command line: data.train")
    assert "[{prefix: 0" not in told


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1 a 2", "blend.txt:1: '2' stands alone at the end; write pairs: weight prefix"),
        ("1 a\nb 2", "blend.txt:2: 'b' is no weight, a number above 0 or auto; write pairs: weight prefix"),
        ("-1 a", "blend.txt:1: '-1' is no weight, a number above 0 or auto; write pairs: weight prefix"),
        ("# nothing", "blend.txt: lists no source; write pairs: weight prefix"),
    ],
)
def test_a_file_of_weights_that_is_wrong(write: Callable[..., Path], tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "blend.txt").write_text(text)
    assert message(write({"data.train": "blend.txt"})) == problem


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "1.0e-3", ".001", "0.001", "1_0e-4"])
def test_scientific_notation_is_a_number(write: Callable[..., Path], written: str) -> None:
    text = yaml.safe_dump(BASE).replace("micro_batch_size: 4", f"micro_batch_size: 4\n  optimizer: {{lr: {written}}}")
    assert load_run_config(write(text)).optimizer.lr == pytest.approx(1e-3)
    assert load_run_config(write(), [f"train.optimizer.lr={written}"]).optimizer.lr == pytest.approx(1e-3)


@pytest.mark.parametrize("word", ["no", "on", "1:30", "2026-01-01", "010", "0x10"])
def test_what_yaml_1_1_mistakes_is_a_string(write: Callable[..., Path], word: str) -> None:
    assert load_run_config(write(), [f"run.dir={word}"]).run.dir == Path(word)


def test_overrides_are_yaml_and_reach_everywhere(write: Callable[..., Path]) -> None:
    overrides = [
        "train.steps=1e2",
        "train.trace_steps=[3, 4]",
        "train.schedule.warmup_steps=5",
        "data.train.0.prefix=other=path",
        "deepspeed.zero_optimization.stage=2",
        "deepspeed.gradient_clipping=0.5",
    ]
    config = load_run_config(write(), overrides)
    assert (config.train.steps, config.train.trace_steps) == (100, (3, 4))
    assert config.schedule.warmup_steps == 5
    assert config.data.train[0].prefix == Path("other=path")
    assert (config.zero_stage, config.gradient_clipping) == (2, 0.5)


def test_the_last_of_two_overrides_holds(write: Callable[..., Path]) -> None:
    assert load_run_config(write(), ["train.steps=5", "train.steps=6"]).train.steps == 6


def test_an_override_replaces_the_deepspeed_json_before_others_reach_into_it(write: Callable[..., Path]) -> None:
    Path("zero3.json").write_text('{"zero_optimization": {"stage": 3, "sub_group_size": 1e9}}')
    overrides = ["deepspeed.zero_optimization.sub_group_size=7", "deepspeed=zero3.json"]
    config = load_run_config(write({"deepspeed": "missing.json"}), overrides)
    assert config.zero_stage == 3
    assert config.deepspeed.document["zero_optimization"]["sub_group_size"] == 7


def test_without_a_deepspeed_json_a_run_is_fp32_at_stage_1(write: Callable[..., Path]) -> None:
    config = load_run_config(write({"deepspeed": ABSENT})).resolve(world_size=4, vocab_size=64)
    assert (config.precision, config.zero_stage) == ("fp32", 1)


def test_the_optimizer_comes_from_whichever_place_states_it(write: Callable[..., Path]) -> None:
    assert load_run_config(write()).optimizer.lr == 3e-4
    assert load_run_config(write({"train.optimizer": {"lr": 0.5}})).optimizer.lr == 0.5
    section = {"type": "Adam", "params": {"lr": 0.25, "weight_decay": 0.5}}
    ours = load_run_config(write({"deepspeed.optimizer": section})).optimizer
    assert (ours.lr, ours.betas, ours.weight_decay) == (0.25, (0.9, 0.999), 0.5)


def test_auto_in_the_scheduler_follows_the_run(write: Callable[..., Path]) -> None:
    params = {"warmup_num_steps": 10, "warmup_min_lr": "auto", "warmup_max_lr": "auto", "total_num_steps": "auto"}
    edits = {"deepspeed.scheduler": {"type": "WarmupDecayLR", "params": params}, "train.optimizer": {"lr": 0.5}}
    scheduler = load_run_config(write(edits)).deepspeed.scheduler
    assert scheduler is not None
    assert scheduler["params"] == {
        "warmup_num_steps": 10,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 0.5,
        "total_num_steps": 200,
    }


def test_batch_sizes_may_be_stated_twice_when_they_agree(write: Callable[..., Path]) -> None:
    stated = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "vocabulary_size": 8192,
        "pipeline": {"stages": 2},
    }
    config = load_run_config(write({f"deepspeed.{key}": value for key, value in stated.items()}))
    assert config.resolve(world_size=8, vocab_size=8192).gradient_accumulation_steps == 4


def test_sections_are_frozen(write: Callable[..., Path]) -> None:
    config = load_run_config(write())
    with pytest.raises(ValidationError):
        config.train.steps = 3  # type: ignore[misc]


def test_sections_can_be_made_by_hand() -> None:
    model = LlamaConfig(
        architecture="llama",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    assert (model.head_dim, model.num_key_value_heads) == (8, 4)
    assert TrainSection(steps=1, global_batch_size=1, micro_batch_size=1, stop_after=None).stop_after is None


# ------------------------------------------------------------------------------------------------------ round trips


def round_trip(config: RunConfig, folder: Path) -> RunConfig:
    path = folder / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return load_run_config(path)


def test_a_resolved_run_states_everything_and_loads_back_equal(write: Callable[..., Path], tmp_path: Path) -> None:
    edits = {
        "data.split": [0.9, 0.1],
        "train.eval_every": 5,
        "train.schedule": {"name": "wsd", "warmup_steps": 3, "decay_steps": 20},
        "train.trace_steps": [1, 7],
        "parallel.stage_layers": [1, 3],
        "deepspeed.zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "none"}},
        "deepspeed.optimizer": {"type": "adamw", "params": {"lr": "auto", "betas": [0.8, 0.9]}},
        "deepspeed.train_batch_size": 32,
    }
    resolved = load_run_config(write(edits)).resolve(world_size=8, vocab_size=8192)
    again = round_trip(resolved, tmp_path)
    assert again == resolved
    assert again.resolve(world_size=8, vocab_size=None) == resolved
    assert again.source == Path("config.yaml")
    assert "null" not in resolved.to_yaml()
    document = yaml.safe_load(resolved.to_yaml())
    assert document["parallel"]["data"] == 2
    assert document["model"]["vocab_size"] == 8192
    assert document["deepspeed"]["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 256 * 256}
    assert document["deepspeed"]["optimizer"]["params"]["lr"] == 3e-4


@pytest.mark.parametrize(
    "model",
    [
        {"model.qk_norm": True, "model.rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"model.architecture": "gpt_neox", "model.rotary_pct": 0.5, "model.hidden_act": "gelu_tanh"},
    ],
)
def test_every_family_loads_back_equal(write: Callable[..., Path], tmp_path: Path, model: dict[str, Any]) -> None:
    resolved = load_run_config(write(model)).resolve(world_size=8, vocab_size=8192)
    assert round_trip(resolved, tmp_path) == resolved
    assert read_model(resolved.model.model_dump(mode="json")) == resolved.model


def test_a_config_can_be_sent_to_another_process(write: Callable[..., Path]) -> None:
    config = load_run_config(write(), ["train.steps=7"]).resolve(world_size=4, vocab_size=64)
    again = copy.deepcopy(config)
    assert again == config
    assert again.origin.overrides == (("train", "steps"),)


def test_runs_that_differ_are_not_equal(write: Callable[..., Path]) -> None:
    config = load_run_config(write())
    assert config != load_run_config(write({"run.seed": 1}))
    assert config != load_run_config(write({"deepspeed.gradient_clipping": 0.5}))


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    name=st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1).filter(lambda text: text.strip()),
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**63),
    clip=st.floats(0, 1e6),
)
@example(name="1e3", lr=1.0, seed=0, clip=0.0)  # plain to a YAML 1.1 writer, a number to our reader
@example(name="0E0", lr=1.0, seed=0, clip=0.0)
@example(name="~a/$b/${c}/$$", lr=1.0, seed=0, clip=0.0)
def test_any_name_and_number_survives_the_round_trip(
    tmp_path: Path, name: str, lr: float, seed: int, clip: float
) -> None:
    edits = {
        "run.dir": escape(name),
        "run.seed": seed,
        "train.optimizer": {"lr": lr},
        "deepspeed.gradient_clipping": clip,
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(changed(edits)), encoding="utf-8")  # which is YAML too
    config = load_run_config(path).resolve(world_size=4, vocab_size=64)
    assert round_trip(config, tmp_path) == config


# --------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("section", "last_step", "saved"),
    [
        ({}, 7, [7]),
        ({"every": 0}, 1, [1]),
        ({"last": False}, 7, []),
        ({"every": 3}, 7, [3, 6, 7]),
        ({"every": 3, "last": False}, 7, [3, 6]),
        ({"every": 7}, 7, [7]),
        ({"every": 8, "last": False}, 7, []),
    ],
)
def test_a_run_keeps_its_last_checkpoint_unless_told_not_to(
    write: Callable[..., Path], section: dict[str, Any], last_step: int, saved: list[int]
) -> None:
    checkpoint = load_run_config(write({"checkpoint": section})).checkpoint
    assert [step for step in range(1, last_step + 1) if checkpoint.due(step, last_step)] == saved
    assert checkpoint.keeps == (section.get("last", True) or section.get("every", 0) > 0)


ON_NVME = {
    "deepspeed.zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}},
}


@pytest.mark.parametrize(
    ("section", "refusal"),
    [
        ({}, None),
        ({"every": 0}, None),
        ({"last": False}, None),
        ({"every": 5}, "checkpoint.every=5: {}write 'cpu', or checkpoint.every=0"),
        ({"last": True}, "checkpoint.last=true: {}write 'cpu', or checkpoint.last=false"),
        (
            {"every": 5, "last": True},
            "checkpoint.every=5: {}write 'cpu', or checkpoint.every=0 and checkpoint.last=false",
        ),
    ],
)
def test_a_state_on_nvme_is_refused_a_checkpoint_only_where_one_was_asked_for(
    write: Callable[..., Path], section: dict[str, Any], refusal: str | None
) -> None:
    path = write({**ON_NVME, "checkpoint": section})
    if refusal is None:
        config = load_run_config(path).resolve(world_size=4, vocab_size=64)
        assert not config.checkpoint.keeps
        assert yaml.safe_load(config.to_yaml())["checkpoint"]["last"] is False
    else:
        text = refusal.format("a checkpoint reads the state in memory; ")
        assert message(path).endswith(f"device='nvme' does not go with {text}")


# ----------------------------------------------------------------------------------------- a shorter try than the file

LONG: dict[str, Any] = {
    "train.steps": 200,
    "train.stop_after": 150,
    "train.trace_steps": [5, 100],
    "train.schedule": {"name": "cosine", "warmup_steps": 30, "min_lr": 0},
}
WSD: dict[str, Any] = {"train.schedule": {"name": "wsd", "warmup_steps": 30, "decay_steps": 60, "min_lr": 0}}


@pytest.mark.parametrize(
    ("overrides", "expected", "notes"),
    [
        (["train.steps=150"], (150, (5, 100), 30), []),
        (
            ["train.steps=20"],
            (None, (5,), 20),
            [
                "note: train.stop_after=150 of the run file is beyond train.steps=20, and is left out",
                "note: train.trace_steps=[100] of the run file is beyond train.steps=20, and is left out",
                "note: train.schedule.warmup_steps=20, not 30 as in the run file: train.steps=20",
            ],
        ),
        (
            ["train.stop_after=10"],
            (10, (5,), 30),
            ["note: train.trace_steps=[100] of the run file is beyond train.stop_after=10, and is left out"],
        ),
        (["train.stop_after=4"], (4, (), 30), ["note: train.trace_steps=[5, 100] of the run file is beyond "]),
        (["train.stop_after=null"], (None, (5, 100), 30), []),
        (
            ["train.steps=1"],
            (None, (), 1),
            ["note: train.stop_after=150", "note: train.trace", "note: train.sch"],
        ),
        (["train.steps=40", "train.stop_after=30", "train.trace_steps=[30]"], (30, (30,), 30), []),
        (
            ["train.steps=20", "train.schedule.warmup_steps=3", "train.trace_steps=[7]"],
            (None, (7,), 3),
            ["note: train.s"],
        ),
    ],
)
def test_a_shorter_try_fits_what_the_file_has_for_more_steps(
    write: Callable[..., Path],
    tmp_path: Path,
    overrides: list[str],
    expected: tuple[int | None, tuple[int, ...], int],
    notes: list[str],
) -> None:
    config = load_run_config(write(LONG), overrides).resolve(world_size=4, vocab_size=64)
    assert (config.train.stop_after, config.train.trace_steps, config.schedule.warmup_steps) == expected
    assert len(config.notes) == len(notes)
    assert all(said.startswith(note) for said, note in zip(config.notes, notes, strict=True))
    again = round_trip(config, tmp_path)
    assert again == config, "the resolved file holds what acts"
    assert again.notes == ()


@pytest.mark.parametrize(("steps", "shape"), [(90, (30, 60)), (45, (15, 30)), (7, (3, 4)), (2, (1, 1)), (1, (0, 1))])
def test_a_warm_up_and_a_final_decay_shrink_alike(
    write: Callable[..., Path], steps: int, shape: tuple[int, int]
) -> None:
    schedule = load_run_config(write(WSD), [f"train.steps={steps}"]).schedule
    assert (schedule.warmup_steps, schedule.decay_steps) == shape


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.steps=20", "train.trace_steps=[30]"], "trace_steps=30 is beyond train.steps=20; use at most 20"),
        (["train.steps=20", "train.stop_after=30"], "train.stop_after=30 is beyond train.steps=20; use at most 20"),
        (["train.schedule.warmup_steps=300"], "warmup_steps=300 is more than train.steps=200; use at most 200"),
        (["train.steps=20", "train.schedule.warmup_steps=30"], "is more than train.steps=20; use at most 20"),
        (["train.steps=none"], "train.steps='none' is not an integer of at least 1"),
    ],
)
def test_what_the_command_line_states_twice_over_stays_an_error(
    write: Callable[..., Path], overrides: list[str], expected: str
) -> None:
    assert expected in message(write(LONG), *overrides)


@pytest.mark.parametrize("wrong", [3, [3], {"schedule": 3}, {"schedule": {"warmup_steps": "x"}, "trace_steps": 5}])
def test_a_try_leaves_values_of_a_wrong_kind_to_the_validation(write: Callable[..., Path], wrong: Any) -> None:
    path = write({"train": wrong})
    text = message(path, "train.steps=5") if isinstance(wrong, dict) else message(path)
    assert "command line" in text or "run.yaml" in text


# --------------------------------------------------------------------------------------------- defaults that act


@pytest.mark.parametrize(
    ("edits", "lowest"),
    [
        ({}, 3e-5),
        ({"train.optimizer": {"lr": 6e-4}}, 6e-5),
        ({"train.schedule": {"name": "linear", "warmup_steps": 3}}, 3e-5),
        ({"train.schedule": {"name": "wsd", "decay_steps": 3}}, 3e-5),
        ({"train.schedule": {"name": "constant"}}, None),
        ({"train.schedule": {"min_lr": 0}}, 0.0),
        ({"train.schedule": {"min_lr": 1e-4}}, 1e-4),
        ({"deepspeed.optimizer": {"type": "AdamW", "params": {"lr": 0.25}}}, 0.025),
    ],
)
def test_the_rate_of_the_last_step_is_written_out(
    write: Callable[..., Path], tmp_path: Path, edits: dict[str, Any], lowest: float | None
) -> None:
    config = load_run_config(write(edits)).resolve(world_size=4, vocab_size=64)
    assert config.schedule.min_lr == lowest
    assert yaml.safe_load(config.to_yaml())["train"]["schedule"].get("min_lr") == lowest
    assert round_trip(config, tmp_path).schedule == config.schedule


# ------------------------------------------------------------------------------------------------------------ paths

PATHS: dict[str, Callable[[RunConfig], object]] = {
    "run.dir": lambda config: config.run.dir,
    "data.tokenizer": lambda config: config.data.tokenizer,
    "data.index_cache": lambda config: config.data.index_cache,
    "init_from": lambda config: config.init_from,
    "resume": lambda config: config.resume,
}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~", "/home/ada"),
        ("~/x", "/home/ada/x"),
        ("$SCRATCH/x", "/scratch/x"),
        ("${SCRATCH}/x_${JOB}", "/scratch/x_7"),
        ("$MINE/x", "/home/ada/own/x"),
        ("a~b/~", "a~b/~"),
        ("./~/x", "./~/x"),
        ("a$$b", "a$b"),
        ("a$/b$", "a$/b$"),
        ("$$SCRATCH", "$SCRATCH"),
    ],
)
def test_every_path_of_a_run_file_is_expanded(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, meant: str
) -> None:
    for name, value in {"HOME": "/home/ada", "SCRATCH": "/scratch", "JOB": "7", "MINE": "~/own"}.items():
        monkeypatch.setenv(name, value)
    edits: dict[str, Any] = {
        "data.train": [{"prefix": written}],
        "data.valid": [{"prefix": written, "name": "v"}],
        "deepspeed.zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": written}},
    }
    for key, value in PATHS.items():
        both = {} if key == "resume" else {key: written}
        loaded = load_run_config(write(edits | both), [] if both else [f"{key}={json.dumps(written)}"])
        config = loaded.resolve(world_size=4, vocab_size=64)
        assert str(value(config)) == str(Path(meant)) or value(config) == meant
        sources = (config.data.train[0], config.data.valid[0])
        assert [source.prefix for source in sources] == [Path(meant)] * 2
        assert config.deepspeed.document["zero_optimization"]["offload_param"]["nvme_path"] == meant
        assert round_trip(config, tmp_path) == config


def test_files_that_a_run_file_names_are_found_through_variables(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONS", str(tmp_path))
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "blend.txt").write_text("1 $JSONS/books\n")
    config = load_run_config(write({"deepspeed": "$JSONS/zero.json", "data.train": "${JSONS}/blend.txt"}))
    assert config.zero_stage == 2
    assert config.data.train[0].prefix == tmp_path / "books"


@pytest.mark.parametrize("key", ["run.dir", "data.tokenizer", "init_from", "resume", "deepspeed", "data.train"])
@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("${NOT_SET}/x", " needs the variable NOT_SET, which is not set in the environment; set it, "),
        ("a/$NOT_SET", " needs the variable NOT_SET, which is not set in the environment; set it, "),
        ("$EMPTY/x", " needs the variable EMPTY, which is empty in the environment; set it, "),
        ("${A:-b}/x", " holds ${A:-b}, which is no variable; write ${NAME}, or $$ for a dollar sign"),
        ("${A/x", " holds ${A/x, which is no variable; write ${NAME}, or $$ for a dollar sign"),
        ("~nobody-of-this-name/x", " asks for the home of 'nobody-of-this-name', a user that this machine does not "),
    ],
)
def test_a_path_that_cannot_be_expanded_names_what_is_missing(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, key: str, written: str, problem: str
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setenv("EMPTY", "")
    expected = f"={written!r}{problem}"
    assert message(write({key: written})).startswith(f"run.yaml: {key}{expected}")
    assert message(write(), f"{key}={json.dumps(written)}").startswith(f"command line: {key}{expected}")


def test_texts_that_are_no_paths_stay_as_they_are(write: Callable[..., Path]) -> None:
    edits = {"data.tokenizer": "tok", "data.fim_rate": 0.5, "data.fim_tokens": ["$PRE", "~", "${SUF}"]}
    assert load_run_config(write(edits)).data.fim_tokens == ("$PRE", "~", "${SUF}")


# ----------------------------------------------------------------------------------------------------------- guesses

GUESSES: list[tuple[str, str]] = [
    ("seed=1", "'run.seed'"),
    ("steps=1", "'train.steps'"),
    ("max_steps=1", "'train.steps'"),
    ("train.max_steps=1", "'train.steps'"),
    ("tensor_parallel=2", "'parallel.tensor'"),
    ("parallel.tensor_parallel=2", "'parallel.tensor'"),
    ("parallel.tp=2", "'parallel.tensor'"),
    ("parallel.pipeline_model_parallel_size=2", "'parallel.pipeline'"),
    ("learning_rate=1", "'train.optimizer.lr'"),
    ("train.lr=1", "'train.optimizer.lr'"),
    ("train.learning_rate=1", "'train.optimizer.lr'"),
    ("weight_decay=1", "'train.optimizer.weight_decay'"),
    ("train.warmup_steps=1", "'train.schedule.warmup_steps'"),
    ("per_device_train_batch_size=1", "'train.micro_batch_size'"),
    ("output_dir=x", "'run.dir'"),
    ("save_steps=5", "'checkpoint.every'"),
    ("train.checkpoint_every=5", "'checkpoint.every'"),
    ("max_grad_norm=1", "'deepspeed.gradient_clipping'"),
    ("gradient_clipping=1", "'deepspeed.gradient_clipping'"),
    ("zero_optimization={}", "'deepspeed.zero_optimization'"),
    ("num_layers=2", "'model.num_hidden_layers'"),
    ("hidden_size=2", "'model.hidden_size'"),
    ("seq_length=2", "'data.sequence_length'"),
    ("model.seq_length=2", "'data.sequence_length'"),
    ("schedule=x", "'parallel.schedule' or 'train.schedule'"),
    ("seeds=1", "'run.seed'"),
    ("train.stpes=1", "'train.steps'"),
    ("modl=1", "'model'"),
    ("n_layers=2", "'model.num_hidden_layers'"),
    ("model.n_layers=2", "'model.num_hidden_layers'"),
    ("model.num_layers=2", "'model.num_hidden_layers'"),
    ("model.n_embd=2", "'model.hidden_size'"),
    ("model.norm_eps=1e-6", "'model.rms_norm_eps'"),
    ("batch_size=2", "'train.global_batch_size' or 'train.micro_batch_size'"),
    ("lr=1", "'train.optimizer.lr'"),
    ("seq_len=2", "'data.sequence_length'"),
    ("block_size=2", "'data.sequence_length'"),
    ("max_iters=2", "'train.steps'"),
    ("train_iters=2", "'train.steps'"),
    ("logging_steps=2", "'train.log_every'"),
    ("log_interval=2", "'train.log_every'"),
    ("torch_dtype=bfloat16", "'train.precision'"),
    ("dtype=bfloat16", "'train.precision'"),
    ("bf16=true", "'train.precision' or 'deepspeed.bf16'"),
    ("warmup_ratio=0.1", "'train.schedule.warmup_steps'"),
    ("accumulate_grad_batches=2", "'deepspeed.gradient_accumulation_steps'"),
    ("optimizer.lr=1", "'train.optimizer.lr'"),
    ("optim.lr=1", "'train.optimizer.lr'"),
    ("optimizer.learning_rate=1", "'train.optimizer.lr'"),
    ("schedule.warmup_steps=1", "'train.schedule.warmup_steps'"),
    ("training.max_steps=1", "'train.steps'"),
    ("trian.steps=1", "'train.steps'"),
    ("zero_optimization.stage=2", "'deepspeed.zero_optimization.stage'"),
    ("bf16.enabled=true", "'deepspeed.bf16.enabled'"),
    ("schedule={virtual_stages: 2, overlap: true}", "'parallel.schedule' or 'train.schedule'"),
    ("schedule={name: wsd, min_lr: 0}", "'train.schedule'"),
]


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.precision=bfloat16", "'bf16'"),
        ("train.precision=float16", "'fp16'"),
        ("train.precision=half", "'fp16'"),
        ("train.precision=BF16", "'bf16'"),
        ("train.precision=torch.bfloat16", "'bf16'"),
        ("train.precision=bf16-mixed", "'bf16'"),
        ("train.precision=float32", "'fp32'"),
        ("train.precision=32", "'fp32'"),
        ("train.precision=16", "'fp16'"),
        ("train.precision=fp8", None),
        ("train.precision=true", None),
        ("train.precision=[bf16]", None),
        ("train.schedule.name=cosine_with_min_lr", "'cosine'"),
        ("train.optimizer.name=AdamW", "'adamw'"),
        ("train.optimizer.name=muon", None),
        ("parallel.schedule=1F1B", "'1f1b'"),
        ("parallel.schedule=interleaved", "'interleaved_1f1b'"),
        ("deepspeed.data_types.grad_accum_dtype=float32", "'fp32'"),
        ("model.architecture=mistral", "'llama'"),
        ("model.architecture=GPT-2", "'gpt2'"),
    ],
)
def test_a_value_by_another_name_is_understood(write: Callable[..., Path], override: str, meant: str | None) -> None:
    told = message(write(), override)
    assert told.startswith(f"command line: {override.partition('=')[0]}=")
    assert told.endswith(f"; did you mean {meant}?") if meant else "did you mean" not in told


@pytest.mark.parametrize(("override", "hint"), GUESSES)
def test_a_key_of_another_place_or_trainer_is_understood(write: Callable[..., Path], override: str, hint: str) -> None:
    key = override.partition("=")[0]
    assert message(write(), override) == f"command line: {key} is not a key; did you mean {hint}?"


def test_every_alias_stands_for_a_key() -> None:
    """And for one key alone, but for the words that mean more than one, and is no key of the run file itself."""
    words = Counter(word for told in suggestions._ALIASES.values() for word in told.split())
    several = {word for word, count in words.items() if count > 1}
    assert several == {"batch_size", "bf16", "fp16", "norm_eps", "norm_epsilon", "layernorm_epsilon"}
    assert set(suggestions._ALIASES) <= suggestions.known_keys(RunConfig)
    own = {path[-1] for path in suggestions._paths(RunConfig, (), False)}
    assert not own & set(words)


# ------------------------------------------------------------------------------------------- what is wrong: values

INTEGER = "is not an integer of at least 1"

FORM: list[tuple[str, dict[str, Any], str]] = [
    # keys
    ("top key", {"modle": 1}, "run.yaml: modle is not a key; did you mean 'model'?"),
    ("section key", {"train.optimiser": {}}, "run.yaml: train.optimiser is not a key; did you mean 'train.optimizer'?"),
    (
        "misspelt null",
        {"train.stop_afterr": None},
        "run.yaml: train.stop_afterr is not a key; did you mean 'train.stop_after'?",
    ),
    (
        "model key",
        {"model.hiden_size": 3},
        "run.yaml: model.hiden_size is not a key; did you mean 'model.hidden_size'?",
    ),
    (
        "other family's key",
        {"model.layer_norm_epsilon": 1e-5},
        "run.yaml: model.layer_norm_epsilon is not a key; did you mean 'model.rms_norm_eps'?",
    ),
    (
        "deep key",
        {"train.optimizer": {"learning_rat": 1}},
        "run.yaml: train.optimizer.learning_rat is not a key; did you mean 'train.optimizer.lr'?",
    ),
    (
        "key in a list",
        {"data.train": [{"prefx": "a", "prefix": "b"}]},
        "run.yaml: data.train.0.prefx is not a key; did you mean 'data.train.0.prefix'?",
    ),
    (
        "our own field",
        {"origin": 1},
        "run.yaml: origin is not a key; allowed: checkpoint, data, deepspeed, init_from, model, parallel, "
        "plugins, resume, run, train",
    ),
    ("key like a family", {"run.llama": 1}, "run.yaml: run.llama is not a key; allowed: dir, seed"),
    (
        "key without a neighbour",
        {"model.gpt2": 1},
        "run.yaml: model.gpt2 is not a key; allowed: architecture, attention_bias, attention_dropout, "
        "attention_output_bias, head_dim, "
        "hidden_dropout, hidden_size, initializer_range, "
        "intermediate_size, max_position_embeddings, mlp_bias, num_attention_heads, num_hidden_layers, "
        "num_key_value_heads, qk_norm, rms_norm_eps, rope_scaling, rope_theta, tie_word_embeddings, vocab_size",
    ),
    # missing
    ("missing section", {"run": ABSENT}, "run.yaml: run is missing; write a section {dir, seed}"),
    (
        "missing value",
        {"train.steps": ABSENT},
        "run.yaml: train.steps is missing; write an integer of at least 1",
    ),
    (
        "null is missing",
        {"train.steps": None},
        "run.yaml: train.steps is empty; write an integer of at least 1",
    ),
    ("missing path", {"run.dir": ABSENT}, "run.yaml: run.dir is missing; write a path"),
    (
        "missing sources",
        {"data.train": ABSENT},
        "run.yaml: data.train is missing; write a list of {prefix, dataset, options, weight}",
    ),
    (
        "missing architecture",
        {"model.architecture": ABSENT},
        "run.yaml: model.architecture is missing; write 'llama', 'gpt2' or 'gpt_neox'",
    ),
    # types and ranges
    ("zero", {"train.steps": 0}, f"run.yaml: train.steps=0 {INTEGER}"),
    ("fraction", {"train.steps": 1.5}, f"run.yaml: train.steps=1.5 {INTEGER}"),
    ("string of digits", {"train.steps": "12"}, f"run.yaml: train.steps='12' {INTEGER}"),
    ("boolean", {"train.steps": True}, f"run.yaml: train.steps=true {INTEGER}"),
    ("not finite", {"train.steps": float("inf")}, f"run.yaml: train.steps=Infinity {INTEGER}"),
    ("section for a value", {"train.steps": {"a": 1}}, f"run.yaml: train.steps={{...}} {INTEGER}"),
    ("seed", {"run.seed": -1}, "run.yaml: run.seed=-1 is not an integer of at least 0"),
    ("flag", {"model.tie_word_embeddings": "yes"}, "run.yaml: model.tie_word_embeddings='yes' is not true or false"),
    ("path", {"run.dir": 3}, "run.yaml: run.dir=3 is not a path"),
    ("empty path", {"data.tokenizer": " "}, "run.yaml: data.tokenizer=' ' is not a path"),
    ("rate", {"train.optimizer": {"lr": 0}}, "run.yaml: train.optimizer.lr=0 is not a number above 0"),
    ("inf", {"train.optimizer": {"lr": float("inf")}}, "run.yaml: train.optimizer.lr=Infinity is not a number above 0"),
    ("nan", {"train.optimizer": {"lr": float("nan")}}, "run.yaml: train.optimizer.lr=NaN is not a number above 0"),
    (
        "decay",
        {"train.optimizer": {"weight_decay": -1}},
        "run.yaml: train.optimizer.weight_decay=-1 is not a number of at least 0",
    ),
    (
        "betas",
        {"train.optimizer": {"betas": [0.9, 1.0]}},
        "run.yaml: train.optimizer.betas=[0.9, 1.0] is not two numbers, each at least 0 and under 1",
    ),
    (
        "optimizer",
        {"train.optimizer": {"name": "sgd"}},
        "run.yaml: train.optimizer.name='sgd' is not 'adamw' or 'lion'",
    ),
    (
        "curve",
        {"train.schedule": {"name": "cosin"}},
        "run.yaml: train.schedule.name='cosin' is not 'cosine', 'linear', 'constant' or 'wsd'; did you mean 'cosine'?",
    ),
    (
        "family",
        {"model.architecture": "bert"},
        "run.yaml: model.architecture='bert' is not 'llama', 'gpt2' or 'gpt_neox'",
    ),
    ("replicas", {"parallel.data": "all"}, "run.yaml: parallel.data='all' is not an integer of at least 1, or 'auto'"),
    (
        "trace",
        {"train.trace_steps": 5},
        "run.yaml: train.trace_steps=5 is not a list of integers of at least 1",
    ),
    ("value for a section", {"run": 3}, "run.yaml: run=3 is not a section {dir, seed}"),
    (
        "value for sources",
        {"data.train": 1},
        "run.yaml: data.train=1 is not a list of {prefix, dataset, options, weight}",
    ),
    ("weights file", {"data.train": "a.txt"}, "a.txt: no such file"),
    (
        "value for a source",
        {"data.train": [["a"]]},
        "run.yaml: data.train.0=['a'] is not a section {prefix, dataset, options, weight}",
    ),
    (
        "shares",
        {"data.split": [0.5, 0.4]},
        "run.yaml: data.split=[0.5, 0.4] is not two or three shares that sum to 1, such as [0.98, 0.01, 0.01], "
        "or whole numbers",
    ),
    (
        "weight",
        {"data.train": [{"prefix": "a", "weight": 0}]},
        "run.yaml: data.train.0.weight=0 is not a number above 0, or 'auto' for the size in tokens",
    ),
    (
        "name of a validation set",
        {"data.valid": [{"prefix": "a", "name": "a/b"}]},
        "run.yaml: data.valid.0.name='a/b' is not a name of letters, digits, '.', '_' and '-'",
    ),
    (
        "tokens of the middle",
        {"data.fim_tokens": ["<P>", "<M>"]},
        "run.yaml: data.fim_tokens=['<P>', '<M>'] is not three tokens: prefix, middle, suffix",
    ),
    ("json", {"deepspeed": [1]}, "run.yaml: deepspeed=[1] is neither a path nor a section"),
    (
        "schedule typo",
        {"parallel.schedule": "1fb1"},
        "run.yaml: parallel.schedule='1fb1' is not 'gpipe', '1f1b', 'interleaved_1f1b', 'zb_h1' or 'zb_v'",
    ),
    # not available yet
    (
        "sequence parallel, no flag",
        {"parallel.sequence_parallel": 2},
        "run.yaml: parallel.sequence_parallel=2 is not true or false",
    ),
    # within a section
    (
        "kept in any case, where all are",
        {"checkpoint": {"keep_every": 4}},
        "run.yaml: checkpoint.keep_every=4 stands without checkpoint.keep_last, and all are kept; give both, or "
        "neither",
    ),
    (
        "rollback without checkpoints",
        {"train.spike": {"action": "rollback"}},
        "run.yaml: train.spike.action='rollback' has no checkpoint to go back to before the last step; "
        "set checkpoint.every, or write skip",
    ),
    (
        "rollback in an order that ends",
        {"train.spike": {"action": "rollback"}, "checkpoint": {"every": 10}, "data.order": "megatron"},
        "run.yaml: train.spike.action='rollback' passes samples over, and data.order='megatron' has no more than it "
        "needs; write data.order=streaming, or skip",
    ),
    (
        "factor of a spike",
        {"train.spike": {"factor": 1}},
        "run.yaml: train.spike.factor=1 is not a number above 1",
    ),
    (
        "key of a spike",
        {"train.spike": {"windows": 10}},
        "run.yaml: train.spike.windows is not a key; did you mean 'train.spike.window'?",
    ),
    (
        "kept and never written",
        {"checkpoint": {"every": 100, "keep_last": 2, "keep_every": 250}},
        "run.yaml: checkpoint.keep_every=250 is no multiple of checkpoint.every=100; use 200 or 300",
    ),
    (
        "two starts",
        {"resume": "runs/old/checkpoints/step_5", "init_from": "llama"},
        "run.yaml: init_from='llama' stands beside resume='runs/old/checkpoints/step_5', which has weights too; keep "
        "one of them",
    ),
    ("no source", {"data.train": []}, "run.yaml: data.train has no source; write one: [{prefix: PATH}]"),
    (
        "sets of one name",
        {"data.valid": [{"prefix": "a/web"}, {"prefix": "b/web"}]},
        "run.yaml: data.valid.1.name='web' stands twice; give each set a name of its own",
    ),
    (
        "some weights auto",
        {"data.train": [{"prefix": "a", "weight": "auto"}, {"prefix": "b", "weight": 2}]},
        "run.yaml: data.train.1.weight=2.0 stands beside weights that are auto; write auto for all or none",
    ),
    (
        "middles without a tokenizer",
        {"data.fim_rate": 0.5},
        "run.yaml: data.fim_rate=0.5 cuts text, and there is no data.tokenizer; give it",
    ),
    (
        "ramp-up that starts high",
        {"train.batch_size_rampup": {"start": 32, "increment": 4, "samples": 100}},
        "run.yaml: train.batch_size_rampup.start=32 is not below train.global_batch_size=32; use less, or leave the "
        "ramp-up out",
    ),
    (
        "ramp-up that does not arrive",
        {"train.batch_size_rampup": {"start": 16, "increment": 3, "samples": 100}},
        "run.yaml: train.batch_size_rampup.increment=3 does not divide the 16 sequences from start to the whole batch; "
        "use 1, 2, 4, 8 or 16",
    ),
    (
        "heads",
        {"model.num_attention_heads": 6, "model.num_key_value_heads": 6, "model.hidden_size": 20},
        "run.yaml: model.num_attention_heads=6 does not divide model.hidden_size=20; "
        "use 1, 2, 4, 5, 10 or 20, or give model.head_dim",
    ),
    (
        "groups",
        {"model.num_key_value_heads": 3},
        "run.yaml: model.num_key_value_heads=3 does not divide model.num_attention_heads=8; use 1, 2, 4 or 8",
    ),
    (
        "odd head",
        {"model.head_dim": 33},
        "run.yaml: model.head_dim=33 is odd, and rotary positions turn pairs; use 34",
    ),
    (
        "gpt2 groups",
        {"model.architecture": "gpt2", "model.num_key_value_heads": 4},
        "run.yaml: model.num_key_value_heads=4 is not model.num_attention_heads=8; gpt2 groups no queries: "
        "leave it out, or use llama",
    ),
    (
        "gpt_neox groups",
        {"model.architecture": "gpt_neox", "model.num_key_value_heads": 4},
        "run.yaml: model.num_key_value_heads=4 is not model.num_attention_heads=8; gpt_neox groups no queries: "
        "leave it out, or use llama",
    ),
    (
        "odd turning dims",
        {"model.architecture": "gpt_neox", "model.rotary_pct": 0.4, "model.head_dim": 8},
        "run.yaml: model.rotary_pct=0.4 turns 3 of model.head_dim=8, and rotary positions turn pairs; use 0.25 or 0.5",
    ),
    (
        "no turning dims",
        {"model.architecture": "gpt_neox", "model.rotary_pct": 0.01, "model.head_dim": 12},
        "run.yaml: model.rotary_pct=0.01 turns 0 of model.head_dim=12, and rotary positions turn pairs; use 0.1667",
    ),
    (
        "turning dims beyond the head",
        {"model.architecture": "gpt_neox", "model.rotary_pct": 1.25},
        "run.yaml: model.rotary_pct=1.25 is not a number from 0 to 1",
    ),
    (
        "activation",
        {"model.architecture": "gpt_neox", "model.hidden_act": "relu"},
        "run.yaml: model.hidden_act='relu' is not 'gelu' or 'gelu_tanh'",
    ),
    (
        "scaling without a type",
        {"model.rope_scaling": {"factor": 2}},
        "run.yaml: model.rope_scaling.rope_type is missing; write 'linear' or 'llama3'",
    ),
    (
        "scaling of another type",
        {"model.rope_scaling": {"rope_type": "yarn", "factor": 2}},
        "run.yaml: model.rope_scaling.rope_type='yarn' is not 'linear' or 'llama3'",
    ),
    (
        "scaling that is faster",
        {"model.rope_scaling": {"rope_type": "linear", "factor": 0.5}},
        "run.yaml: model.rope_scaling.factor=0.5 is not a number of at least 1",
    ),
    (
        "scaling with strange keys",
        {"model.rope_scaling": {"rope_type": "linear", "factr": 2, "factor": 2}},
        "run.yaml: model.rope_scaling.factr is not a key; did you mean 'model.rope_scaling.factor'?",
    ),
    (
        "scaling of llama 3 without its bounds",
        {"model.rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}},
        "run.yaml: model.rope_scaling.high_freq_factor is missing; llama3 needs it: a number above 0\n"
        "run.yaml: model.rope_scaling.original_max_position_embeddings is missing; llama3 needs it: an integer of at "
        "least 1",
    ),
    (
        "linear scaling with bounds",
        {"model.rope_scaling": {"rope_type": "linear", "factor": 8, "low_freq_factor": 1}},
        "run.yaml: model.rope_scaling.low_freq_factor=1.0 belongs to llama3, not to linear; leave it out",
    ),
    (
        "scaling with bounds the wrong way round",
        {
            "model.rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 1,
                "original_max_position_embeddings": 8192,
            }
        },
        "run.yaml: model.rope_scaling.high_freq_factor=1.0 is not above model.rope_scaling.low_freq_factor=4.0; use "
        "more, as Llama 3.1 has 4 above 1",
    ),
    (
        "value for a scaling",
        {"model.rope_scaling": 2},
        "run.yaml: model.rope_scaling=2 is not a section {rope_type, factor, low_freq_factor, high_freq_factor, "
        "original_max_position_embeddings}",
    ),
    (
        "two validations",
        {"data.valid": [{"prefix": "v"}], "data.split": [0.9, 0.1]},
        "run.yaml: data.split=[0.9, 0.1] stands beside data.valid; keep one of them",
    ),
    (
        "all dropped",
        {"model.hidden_dropout": 1.0},
        "run.yaml: model.hidden_dropout=1.0 is not a number from 0 to below 1",
    ),
    (
        "two recomputations",
        {"train.recompute": "none", "deepspeed.activation_checkpointing": {"cpu_checkpointing": True}},
        "run.yaml: train.recompute='none' stands beside run.yaml: "
        "deepspeed.activation_checkpointing.cpu_checkpointing=true, which recomputes whole layers; write full, or "
        "leave activation_checkpointing.cpu_checkpointing out",
    ),
    (
        "one in several of none",
        {"train.recompute_every": 2},
        "run.yaml: train.recompute_every=2 belongs to train.recompute=full, not to none; write full, or leave it out",
    ),
    (
        "one in several, and segments",
        {"train.recompute_every": 2, "deepspeed.pipeline": {"activation_checkpoint_interval": 3}},
        "run.yaml: train.recompute_every=2 stands beside run.yaml: "
        "deepspeed.pipeline.activation_checkpoint_interval=3, which recomputes every layer; keep one of them",
    ),
    (
        "compiled layers, whose parameters are gathered within",
        {"train.compile": True, "deepspeed.zero_optimization": {"stage": 3}},
        "run.yaml: train.compile=true stands beside run.yaml: deepspeed.zero_optimization.stage=3, which gathers "
        "parameters inside of a layer; use stage 0 to 2 there, or write false",
    ),
    (
        "compiled layers, whose backward is split",
        {"train.compile": True, "parallel.schedule": "zb_h1", "parallel.pipeline": 2},
        "run.yaml: train.compile=true stands beside parallel.schedule='zb_h1', which computes the weight gradients of "
        "a layer apart from the rest of its backward; use gpipe, 1f1b or interleaved_1f1b, or write false",
    ),
    (
        "evaluation of nothing",
        {"train.eval_every": 10},
        "run.yaml: train.eval_every=10 has nothing to evaluate on; give data.valid or data.split",
    ),
    (
        "wsd",
        {"train.schedule": {"name": "wsd"}},
        "run.yaml: train.schedule.decay_steps is missing; wsd needs the length of its final decay: "
        "an integer of at least 1",
    ),
    (
        "decay of cosine",
        {"train.schedule": {"decay_steps": 3}},
        "run.yaml: train.schedule.decay_steps=3 belongs to wsd, not to cosine; leave it out",
    ),
    (
        "long warm-up",
        {"train.schedule": {"warmup_steps": 201}},
        "run.yaml: train.schedule.warmup_steps=201 is more than train.steps=200; use at most 200",
    ),
    (
        "long wsd",
        {"train.schedule": {"name": "wsd", "warmup_steps": 101, "decay_steps": 100}},
        "run.yaml: train.schedule.warmup_steps + decay_steps=201 is more than train.steps=200; use at most 200",
    ),
    (
        "high floor",
        {"train.schedule": {"min_lr": 0.5}},
        "run.yaml: train.schedule.min_lr=0.5 is above the learning rate 0.0003; use at most that",
    ),
    (
        "late stop",
        {"train.stop_after": 201},
        "run.yaml: train.stop_after=201 is beyond train.steps=200; use at most 200",
    ),
    (
        "late trace",
        {"train.trace_steps": [3, 300]},
        "run.yaml: train.trace_steps=300 is beyond train.steps=200; use at most 200",
    ),
    # in both places
    (
        "two optimizers",
        {"train.optimizer": {"lr": 0.5}, "deepspeed.optimizer": {"type": "AdamW", "params": {"lr": 0.25}}},
        "run.yaml: train.optimizer.lr=0.5 disagrees with run.yaml: deepspeed.optimizer.params.lr=0.25; write 'auto' "
        "there, or state it once",
    ),
    (
        "two schedules",
        {"train.schedule": {"name": "cosine"}, "deepspeed.scheduler": {"type": "WarmupLR"}},
        "run.yaml: train.schedule stands beside run.yaml: deepspeed.scheduler, which states another; delete "
        "train.schedule here (or all of it but warmup_steps), or scheduler there (or write 'auto' for all its params)",
    ),
]

FIT: list[tuple[str, dict[str, Any], int | None, str]] = [
    (
        "ramp-up over replicas",
        {"train.batch_size_rampup": {"start": 14, "increment": 6, "samples": 100}},
        None,
        "run.yaml: train.batch_size_rampup.start=14 is no multiple of train.micro_batch_size=4 x data parallel 1; "
        "use 12 or 16\n"
        "run.yaml: train.batch_size_rampup.increment=6 is no multiple of train.micro_batch_size=4 x data parallel 1; "
        "use 4 or 8",
    ),
    (
        "tensor and heads",
        {"parallel.tensor": 3},
        None,
        "run.yaml: parallel.tensor=3 does not divide model.num_attention_heads=8; use 1, 2, 4 or 8",
    ),
    (
        "tensor and groups",
        {"parallel.tensor": 2, "model.num_attention_heads": 12, "model.num_key_value_heads": 3, "model.head_dim": 4},
        None,
        "run.yaml: parallel.tensor=2 neither divides model.num_key_value_heads=3 nor is divided by it; use 1",
    ),
    (
        "tensor and mlp",
        {"parallel.tensor": 4, "model.intermediate_size": 690},
        None,
        "run.yaml: parallel.tensor=4 does not divide model.intermediate_size=690; use 1 or 2",
    ),
    (
        "tensor and vocabulary",
        {"parallel.tensor": 4, "model.vocab_size": 3},
        None,
        "run.yaml: model.vocab_size=3 is smaller than the tokenizer's 8192; use at least that, or leave it out\n"
        "run.yaml: parallel.tensor=4 is more than model.vocab_size=3; use 1 or 2",
    ),
    (
        "vocabulary",
        {"model.vocab_size": 8191},
        None,
        "run.yaml: model.vocab_size=8191 is smaller than the tokenizer's 8192; use at least that, or leave it out",
    ),
    (
        "pipeline",
        {"parallel.pipeline": 5},
        None,
        "run.yaml: parallel.pipeline=5 is more than model.num_hidden_layers=4; use at most 4",
    ),
    (
        "layers of stages",
        {"parallel.stage_layers": [1, 2]},
        None,
        "run.yaml: parallel.stage_layers=[1, 2] is 2 stages of 3 layers; "
        "write parallel.pipeline=2 numbers that sum to model.num_hidden_layers=4",
    ),
    (
        "number of stages",
        {"parallel.stage_layers": [4]},
        None,
        "run.yaml: parallel.stage_layers=[4] is 1 stages of 4 layers; "
        "write parallel.pipeline=2 numbers that sum to model.num_hidden_layers=4",
    ),
    (
        "virtual stages",
        {"parallel.schedule": "interleaved_1f1b", "parallel.virtual_stages": 3},
        None,
        "run.yaml: parallel.virtual_stages=3 x parallel.pipeline=2 is 6 stages, more than model.num_hidden_layers=4; "
        "use at most 2",
    ),
    (
        "layers of virtual stages",
        {"parallel.schedule": "zb_v", "parallel.virtual_stages": 2, "parallel.stage_layers": [2, 2]},
        None,
        "run.yaml: parallel.stage_layers=[2, 2] is 2 stages of 4 layers; "
        "write parallel.pipeline x parallel.virtual_stages=4 numbers that sum to model.num_hidden_layers=4",
    ),
    (
        "schedule of one stage per rank",
        {"parallel.virtual_stages": 2},
        None,
        "run.yaml: parallel.virtual_stages=2 does not go with parallel.schedule=1f1b, which runs one stage per rank; "
        "use parallel.virtual_stages=1, or parallel.schedule=interleaved_1f1b",
    ),
    (
        "groups of microbatches",
        {"parallel.schedule": "interleaved_1f1b", "parallel.virtual_stages": 2, "train.global_batch_size": 12},
        None,
        "run.yaml: parallel.schedule=interleaved_1f1b runs groups of parallel.pipeline=2 microbatches, and 3 are not "
        "whole groups; use 2 or 4 microbatches a step (train.global_batch_size has steps of 12 sequences)",
    ),
    (
        "groups of microbatches in a ramp-up",
        {
            "parallel.schedule": "interleaved_1f1b",
            "parallel.virtual_stages": 2,
            "train.batch_size_rampup": {"start": 8, "increment": 4, "samples": 100},
        },
        None,
        "run.yaml: parallel.schedule=interleaved_1f1b runs groups of parallel.pipeline=2 microbatches, and 3 are not "
        "whole groups; use 2 or 4 microbatches a step (train.batch_size_rampup has steps of 12 sequences)",
    ),
    (
        "world of no layout",
        {},
        6,
        "run.yaml: parallel.tensor=2 x parallel.pipeline=2 x data parallel 1 is 4 ranks, but 6 were started; "
        "start 4 or 8",
    ),
    (
        "world too small",
        {},
        3,
        "run.yaml: parallel.tensor=2 x parallel.pipeline=2 x data parallel 1 is 4 ranks, but 3 were started; start 4",
    ),
    (
        "world of another layout",
        {"parallel.data": 2},
        4,
        "run.yaml: parallel.tensor=2 x parallel.pipeline=2 x data parallel 2 is 8 ranks, but 4 were started; "
        "start 8, or write parallel.data=auto",
    ),
    (
        "batch",
        {"train.global_batch_size": 30},
        8,
        "run.yaml: train.micro_batch_size=4 x data parallel 2 does not divide train.global_batch_size=30; "
        "use a global batch of 24 or 32",
    ),
    (
        "small batch",
        {"train.global_batch_size": 3},
        None,
        "run.yaml: train.micro_batch_size=4 x data parallel 1 does not divide train.global_batch_size=3; "
        "use a global batch of 4",
    ),
    (
        "positions",
        {"data.sequence_length": 513},
        None,
        "run.yaml: data.sequence_length=513 is longer than model.max_position_embeddings=512; use at most 512",
    ),
    (
        "uneven shares of tokens",
        {"parallel.sequence_parallel": True, "parallel.tensor": 8, "data.sequence_length": 255},
        None,
        "run.yaml: parallel.sequence_parallel=true divides the 1020 tokens of a microbatch over parallel.tensor=8 "
        "ranks, which is not even; use a data.sequence_length of 254 or 256, or a train.micro_batch_size of 8",
    ),
    (
        "global batch",
        {"deepspeed.train_batch_size": 64},
        None,
        "run.yaml: deepspeed.train_batch_size=64 disagrees with train.global_batch_size=32 of run.yaml; "
        "write 'auto' or 32",
    ),
    (
        "micro batch",
        {"deepspeed.train_micro_batch_size_per_gpu": 8},
        None,
        "run.yaml: deepspeed.train_micro_batch_size_per_gpu=8 disagrees with train.micro_batch_size=4 of run.yaml; "
        "write 'auto' or 4",
    ),
    (
        "accumulation",
        {"deepspeed.gradient_accumulation_steps": 8},
        8,
        "run.yaml: deepspeed.gradient_accumulation_steps=8 disagrees with "
        "train.global_batch_size/(train.micro_batch_size x data parallel)=4 of run.yaml; write 'auto' or 4",
    ),
    (
        "stages of the JSON",
        {"deepspeed.pipeline": {"stages": 4}},
        None,
        "run.yaml: deepspeed.pipeline.stages=4 disagrees with parallel.pipeline=2 of run.yaml; write 'auto' or 2",
    ),
    (
        "vocabulary of the JSON",
        {"deepspeed.vocabulary_size": 100},
        None,
        "run.yaml: deepspeed.vocabulary_size=100 disagrees with model.vocab_size=8192 of run.yaml; "
        "write 'auto' or 8192",
    ),
    (
        "several at once",
        {"parallel.tensor": 3, "data.sequence_length": 1024, "train.global_batch_size": 5},
        None,
        "run.yaml: parallel.tensor=3 does not divide model.num_attention_heads=8; use 1, 2, 4 or 8\n"
        "run.yaml: train.micro_batch_size=4 x data parallel 1 does not divide train.global_batch_size=5; "
        "use a global batch of 4 or 8\n"
        "run.yaml: data.sequence_length=1024 is longer than model.max_position_embeddings=512; use at most 512",
    ),
]


@pytest.mark.parametrize(("edits", "expected"), [case[1:] for case in FORM], ids=[case[0] for case in FORM])
def test_a_value_that_is_wrong(write: Callable[..., Path], edits: dict[str, Any], expected: str) -> None:
    path = write(edits)
    with pytest.raises(UserError) as raised:
        load_run_config(path)
    assert str(raised.value) == expected


@pytest.mark.parametrize(("edits", "world_size", "expected"), [case[1:] for case in FIT], ids=[case[0] for case in FIT])
def test_sections_that_do_not_fit(
    write: Callable[..., Path], edits: dict[str, Any], world_size: int | None, expected: str
) -> None:
    config = load_run_config(write(edits))
    with pytest.raises(UserError) as raised:
        config.resolve(world_size=world_size, vocab_size=8192)
    assert str(raised.value) == expected


def test_tokens_are_divided_where_they_divide(write: Callable[..., Path]) -> None:
    for tensor, length in ((1, 255), (4, 255), (8, 256)):
        edits = {"parallel.sequence_parallel": True, "parallel.tensor": tensor, "data.sequence_length": length}
        config = load_run_config(write(edits)).resolve(world_size=None, vocab_size=64)
        assert config.parallel.sequence_parallel


def test_a_vocabulary_must_come_from_somewhere(write: Callable[..., Path]) -> None:
    expected = "run.yaml: model.vocab_size is missing, and there is no tokenizer to take it from; write either"
    assert message(write(), vocab_size=None) == expected


def test_all_faults_are_told_at_once(write: Callable[..., Path]) -> None:
    Path("zero.json").write_text('{"zero_optimization": {"stge": 1}, "gradient_cliping": 1}')
    edits = {"train.steps": 0, "parallel.tensr": 2, "model.rope_theta": "a", "deepspeed": "zero.json"}
    assert message(write(edits)).splitlines() == [
        "run.yaml: model.rope_theta='a' is not a number above 0",
        "run.yaml: parallel.tensr is not a key; did you mean 'parallel.tensor'?",
        "run.yaml: train.steps=0 is not an integer of at least 1",
        "zero.json: zero_optimization.stge is not a key; did you mean 'stage'?",
        "zero.json: gradient_cliping is not a key; did you mean 'gradient_clipping'?",
    ]


@pytest.mark.parametrize(
    "edits",
    [
        {},
        {"model.vocab_size": []},
        {"run": []},
        {"model": [1]},
        {"data": "x"},
        {"train": {"schedule": 3}},
        {"resume": 3},
    ],
)
def test_pydantic_never_speaks(write: Callable[..., Path], edits: dict[str, Any]) -> None:
    text = message(write({"model.hidden_size": "x", **edits}))
    assert not any(word in text for word in ("pydantic", "http", "Input should", "validation error", "type="))
    assert all(line.startswith("run.yaml: ") for line in text.splitlines())


# -------------------------------------------------------------------------------------- what is wrong: command line

OVERRIDES: list[tuple[str, str]] = [
    ("train.steps", "command line: 'train.steps' is not an override; write section.key=value"),
    ("--steps=3", "command line: '--steps=3' is not an override; write section.key=value"),
    ("train..steps=3", "command line: 'train..steps=3' is not an override; write section.key=value"),
    ("=3", "command line: '=3' is not an override; write section.key=value"),
    (
        "train.steps=[1",
        "command line: train.steps='[1' is not YAML: line 1, column 3: expected ',' or ']', but got '<stream end>'",
    ),
    ("train.steps.x=4", "command line: train.steps.x reaches into train.steps=200, which has no 'x'"),
    (
        "data.train.1.prefix=a",
        "command line: data.train.1.prefix reaches into data.train=[{...}], which has no '1'",
    ),
    ("train.stps=4", "command line: train.stps is not a key; did you mean 'train.steps'?"),
    ("train.optimiser.lr=1", "command line: train.optimiser.lr is not a key; did you mean 'train.optimizer.lr'?"),
    ("train.steps=many", "command line: train.steps='many' is not an integer of at least 1"),
    ("train.steps=", "command line: train.steps= has no value; write one, or train.steps=null for the default"),
    ("resume= ", "command line: resume= has no value; write one, or resume=null for the default"),
    ("resume=''", "command line: resume='' is not a string"),
    ("deepspeed=", "command line: deepspeed= has no value; write one, or deepspeed=null for the default"),
    ("train.steps=null", "command line: train.steps is empty; write an integer of at least 1"),
    (
        "parallel.tensor=3",
        "command line: parallel.tensor=3 does not divide model.num_attention_heads=8; use 1, 2, 4 or 8",
    ),
    (
        "train.precision=fp32",
        "run.yaml: deepspeed.bf16.enabled=true disagrees with train.precision='fp32' of run.yaml; write 'auto' or "
        "false here, or change the other",
    ),
    ("deepspeed.bf16.enabld=true", "command line: deepspeed.bf16.enabld is not a key; did you mean 'enabled'?"),
    ("deepspeed=nowhere.json", "nowhere.json: no such file"),
]


@pytest.mark.parametrize(("override", "expected"), OVERRIDES)
def test_an_override_that_is_wrong(write: Callable[..., Path], override: str, expected: str) -> None:
    assert message(write(), override) == expected


def test_an_override_into_a_json_file_is_the_command_lines_fault(write: Callable[..., Path]) -> None:
    Path("zero.json").write_text('{"zero_optimization": {"stage": 9}}')
    path = write({"deepspeed": "zero.json"})
    assert message(path) == "zero.json: zero_optimization.stage=9 is not 0, 1, 2 or 3"
    given = message(path, "deepspeed.zero_optimization.stage=8")
    assert given == "command line: deepspeed.zero_optimization.stage=8 is not 0, 1, 2 or 3"


def test_every_malformed_override_is_told(write: Callable[..., Path]) -> None:
    assert len(message(write(), "a", "b", "train.steps=3").splitlines()) == 2


# ---------------------------------------------------------------------------------------------- what is wrong: files

TEXTS: list[tuple[str, str, str]] = [
    ("syntax", "run: {dir: x\n", "run.yaml: line 2, column 1: expected ',' or '}', but got '<stream end>'"),
    (
        "variable in braces",
        "run: {dir: ${SCRATCH}/x}\n",
        "run.yaml: line 1, column 13: expected ',' or '}', but got '{'; put a text with ${NAME} in quotes here",
    ),
    ("tab", "run:\n\tdir: x\n", "run.yaml: line 2, column 1: found character '\\t' that cannot start any token"),
    ("colon", "run: dir: x\n", "run.yaml: line 1, column 9: mapping values are not allowed here"),
    (
        "duplicate",
        "run: {dir: a, seed: 1, dir: b}",
        "run.yaml: line 1, column 24: dir stands twice in one section; keep one",
    ),
    (
        "duplicate section",
        "run:\n  dir: a\nrun:\n  dir: b\n",
        "run.yaml: line 3, column 1: run stands twice in one section; keep one",
    ),
    ("number as key", "1: a", "run.yaml: line 1, column 1: the key 1 is not a word"),
    (
        "python tag",
        "run: !!python/object/apply:os.system [x]",
        "run.yaml: line 1, column 6: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    (
        "list",
        "[1, 2]",
        "run.yaml: the file holds [1, 2]; write sections: run, model, data, parallel, train, checkpoint, resume, "
        "init_from, plugins, deepspeed",
    ),
    ("two documents", "a: 1\n---\nb: 2\n", "run.yaml: line 2, column 1: but found another document"),
    ("control character", "a: \x01", "run.yaml: unacceptable character #x0001: special characters are not allowed"),
    (
        "circle",
        "&a [*a]",
        "run.yaml: the file holds [[...]]; write sections: run, model, data, parallel, train, checkpoint, resume, "
        "init_from, plugins, deepspeed",
    ),
    ("depth", "[" * 2000 + "]" * 2000, "run.yaml: the file nests too deeply to be read"),
]


@pytest.mark.parametrize(("text", "expected"), [case[1:] for case in TEXTS], ids=[case[0] for case in TEXTS])
def test_a_file_that_is_no_run_file(write: Callable[..., Path], text: str, expected: str) -> None:
    assert message(write(text)) == expected


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n", "{}\n"])
def test_an_empty_file_is_told_as_one(write: Callable[..., Path], text: str) -> None:
    told = message(write(text))
    assert len(told.splitlines()) == 1
    for part in ("run.yaml: the file is empty", "run, model, data and train", "run.yaml is a whole one"):
        assert part in told
    assert message(Path("run.yaml"), "train.steps=3") == told


def test_a_section_without_keys_is_told_as_empty(write: Callable[..., Path]) -> None:
    assert message(write({"run": None})) == "run.yaml: run is empty; write a section {dir, seed}"
    assert message(write({"run.dir": None})) == "run.yaml: run.dir is empty; write a path"
    assert message(write({"data.train": None})).startswith("run.yaml: data.train is empty; write a list")
    assert message(write({"model": None})).startswith("run.yaml: model is empty; write a section {architecture")


@pytest.mark.parametrize(
    ("files", "given", "fix"),
    [
        (["runs/a/config.yaml", "runs/a/DONE.json"], "runs/a", "write runs/a/config.yaml"),
        (["ex/run.yaml"], "ex", "write ex/run.yaml"),
        (["mine/big.yaml", "mine/small.yml"], "mine", "big.yaml, small.yml"),
        (["hf/config.json"], "hf", "init_from: hf"),
        (["nothing/x.txt"], "nothing", "examples/quickstart/run.yaml"),
    ],
)
def test_a_folder_in_the_place_of_a_run_file(
    write: Callable[..., Path], files: list[str], given: str, fix: str
) -> None:
    write()
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    told = message(Path(given))
    assert told.startswith(f"{given}: is ")
    assert "not a run file" in told
    assert fix in told


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"model_type": "llama", "hidden_size": 64}, ["Hugging Face model", "write init_from: hf"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["Hugging Face model", "write init_from: hf"]),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, ["DeepSpeed JSON", "deepspeed: hf/config.js"]),
        ({"train": {"steps": 1}, "model_type": "llama"}, ["model_type is not a key", "model.architecture"]),
    ],
)
def test_a_file_of_another_program_in_the_place_of_a_run_file(
    write: Callable[..., Path], content: dict[str, Any], parts: list[str]
) -> None:
    write()
    Path("hf").mkdir()
    Path("hf/config.json").write_text(json.dumps(content, indent=1))
    told = message(Path("hf/config.json"))
    for part in parts:
        assert part in told


def test_a_file_that_is_not_there(write: Callable[..., Path], tmp_path: Path) -> None:
    write()
    assert message(Path("rum.yaml")) == "rum.yaml: no such file; did you mean 'run.yaml'?"
    assert message(Path("nowhere/run.yaml")) == "nowhere/run.yaml: no such file"
    (tmp_path / "folder.yaml").mkdir()
    assert message(Path("folder.yaml")).startswith("folder.yaml: is a folder, not a run file; ")
    Path("latin.yaml").write_bytes(b"run: \xff")
    assert message(Path("latin.yaml")) == "latin.yaml: the file is not UTF-8 text; save it as UTF-8"


def test_a_json_beside_the_run_file_is_pointed_out(write: Callable[..., Path]) -> None:
    Path("sub").mkdir()
    Path("sub/zero.json").write_text("{}")
    write({"deepspeed": "zero.json"}).rename("sub/run.yaml")
    expected = "run.yaml: deepspeed='zero.json' is relative to the working directory; write 'sub/zero.json'"
    assert message(Path("sub/run.yaml")) == expected


# --------------------------------------------------------------------------------------------------- our own files

RUN_FILES = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*/run.yaml")])


@pytest.mark.parametrize("path", RUN_FILES, ids=[f"{path.parent.name}/{path.stem}" for path in RUN_FILES])
def test_our_run_files_resolve(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_run_config(path)
    vocab_size = None if config.data.tokenizer is None else 8192
    config = config.resolve(world_size=None, vocab_size=vocab_size)
    assert config.precision == "bf16"
    assert config.gradient_accumulation_steps >= 2 * config.parallel.pipeline
    assert 0 < config.checkpoint.every < config.train.steps
    assert config.checkpoint.keep_last is not None, "the disk would fill"


@pytest.mark.parametrize("layout", [(4, 2), (8, 8)])
def test_the_large_run_files_have_their_layouts(layout: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name = {(4, 2): "llama_7b", (8, 8): "llama_70b"}[layout]
    config = load_run_config(Path(f"configs/{name}.yaml"))
    resolved = config.resolve(world_size=4 * layout[0] * layout[1], vocab_size=None)
    assert resolved.layout == ParallelLayout(*layout, 4)
    assert resolved.zero_stage == 1


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ({}, None),
        ({"train.recompute": "selective"}, Recompute("selective")),
        ({"train.recompute": "full", "train.recompute_every": 2}, Recompute("full", every=2)),
        ({"deepspeed.activation_checkpointing": {"partition_activations": True}}, Recompute("full", partition=True)),
        (
            {"train.recompute": "full", "deepspeed.activation_checkpointing": {"cpu_checkpointing": True}},
            Recompute("full", cpu=True),
        ),
        (
            {"model.num_hidden_layers": 8, "deepspeed.activation_checkpointing": {"number_checkpoints": 3}},
            Recompute("full", segment=3),
        ),
        ({"deepspeed.pipeline": {"activation_checkpoint_interval": 4}}, Recompute("full", segment=4)),
        ({"train.recompute": "none", "deepspeed.pipeline": {"activation_checkpoint_interval": 0}}, None),
    ],
)
def test_recomputation_is_stated_in_either_place(
    write: Callable[..., Path], edits: dict[str, Any], expected: Recompute | None
) -> None:
    config = load_run_config(write(edits))
    assert config.recompute == expected
    assert "activation_checkpointing" not in config.deepspeed.engine_config(1, 1)
