"""Which layouts `megalite verify` compares, what a case changes of the run, and what `--scale` keeps of its shape."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.errors import UserError
from megalite.parallel.layout import ParallelLayout
from megalite.pipeline.partition import partition
from megalite.planning.plan import Plan, prepare
from megalite.verify.layouts import (
    case_plan,
    layouts_of,
    read_layouts,
    require_cores,
    require_ranks,
    smaller_layouts,
    write_layout,
)
from megalite.verify.parity_report import ParameterDifference, ParityReport, TensorComparison
from megalite.verify.scaled_down import scale_down

CONFIGS = Path(__file__).parents[2] / "configs"
ALL = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.data=2")


def test_each_axis_of_several_ranks_is_compared_alone_and_then_the_whole() -> None:
    shown = [write_layout(layout) for layout in layouts_of(ParallelLayout(2, 4, 8))]
    assert shown == ["2x1x1", "1x4x1", "1x1x8", "2x4x8"]
    assert layouts_of(ParallelLayout(1, 4, 1)) == (ParallelLayout(1, 4, 1),)
    assert layouts_of(ParallelLayout(1, 1, 1)) == (ParallelLayout(1, 1, 1),)


def test_layouts_are_read_as_they_are_written() -> None:
    assert read_layouts("2x1x1, 1X4x2,2x1x1") == (ParallelLayout(2, 1, 1), ParallelLayout(1, 4, 2))


@pytest.mark.parametrize("text", ["", "2x2", "2x0x1", "2x-1x1", "axbxc", "2x2x2x2"])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a layout; write "):
        read_layouts(text)


def test_a_layout_of_more_ranks_than_were_started_is_refused() -> None:
    with pytest.raises(UserError, match="2x2x1 .* 4 ranks, but 2 .*; start 4 ranks, or"):
        require_ranks([ParallelLayout(1, 2, 1), ParallelLayout(2, 2, 1)], 2)


def target(run_file: Path, *overrides: str) -> Plan:
    return prepare(run_file, [*ALL, *overrides], None)


@pytest.mark.parametrize(
    ("sizes", "limit", "smaller"),
    [
        pytest.param((8, 1, 1), 4, ["2x1x1"], id="an axis of eight"),
        pytest.param((4, 2, 2), 4, ["1x1x2", "1x2x1", "2x1x1", "1x2x2", "2x1x2", "2x2x1"], id="every axis"),
        pytest.param((4, 2, 2), 8, ["1x1x2", "1x2x1", "2x1x1", "1x2x2", "2x1x2", "2x2x1", "2x2x2"], id="more cores"),
        pytest.param((2, 1, 4), 2, ["1x1x2", "2x1x1"], id="two ranks and no more"),
        pytest.param((2, 2, 2), 1, [], id="no rank beside another"),
        pytest.param((4, 1, 3), 4, ["2x1x1"], id="a batch that two replicas do not divide"),
    ],
)
def test_more_ranks_than_a_machine_is_good_for_are_refused(
    run_file: Path, sizes: tuple[int, int, int], limit: int, smaller: list[str]
) -> None:
    given = [f"parallel.{axis}={size}" for axis, size in zip(("tensor", "pipeline", "data"), sizes, strict=True)]
    batch = 3 if sizes[2] == 3 else 16
    plan = prepare(run_file, [*given, "model.num_key_value_heads=8", f"train.global_batch_size={batch}"], None)
    layout = ParallelLayout(*sizes)
    with pytest.raises(UserError) as refused:
        require_cores(plan, layouts_of(layout), limit, cores=2)
    message = str(refused.value)
    numbers = f"{layout} needs {layout.world_size} ranks, .* 2 cores; the limit is {limit} "
    assert re.search(numbers, message), message
    assert message.endswith(" with --oversubscribe")
    assert (f"with --layouts {','.join(smaller)}, use" in message) == bool(smaller)
    # What is named as smaller is taken.
    require_cores(plan, smaller_layouts(plan, limit), limit, cores=2)


def test_as_many_ranks_as_may_start_are_no_matter(run_file: Path) -> None:
    plan = target(run_file)
    require_cores(plan, layouts_of(plan.layout), 8, cores=4)


def test_a_case_is_the_run_but_for_its_precision_and_where_it_writes(run_file: Path, tmp_path: Path) -> None:
    plan = target(
        run_file,
        "deepspeed.bf16={enabled: true}",
        "deepspeed.gradient_accumulation_steps=2",
        "deepspeed.train_batch_size=4",
        "deepspeed.pipeline={stages: 2}",
        "checkpoint.every=5",
        "train.trace_steps=[4]",
        "parallel.stage_layers=[3, 1]",
    )
    case = case_plan(plan, plan.layout, tmp_path / "case")
    assert case.config.precision == "fp32"
    assert case.config.zero_stage == plan.config.zero_stage == 1
    assert case.config.run.dir == tmp_path / "case"
    assert not case.config.checkpoint.keeps
    assert case.config.resume == "never"
    assert case.stage_layers == plan.stage_layers == (range(0, 3), range(3, 4))
    for kept in ("model", "data", "init_from"):
        assert getattr(case.config, kept) == getattr(plan.config, kept)
    assert case.config.train.global_batch_size == plan.config.train.global_batch_size
    assert case.config.run.seed == plan.config.run.seed
    # As training has them, but for the scheduler: the full rate, in which an update shows.
    assert case.config.optimizer == plan.config.optimizer
    assert case.config.schedule.name == "constant"


def test_a_case_without_a_pipeline_has_no_stages_of_one(run_file: Path, tmp_path: Path) -> None:
    plan = target(run_file, "parallel.stage_layers=[3, 1]", "parallel.schedule=gpipe")
    case = case_plan(plan, ParallelLayout(2, 1, 1), tmp_path)
    assert case.config.parallel.stage_layers is None
    assert case.config.parallel.schedule == "1f1b"
    assert case.stage_layers == (range(0, 4),)


def test_what_is_kept_on_nvme_is_kept_in_memory(run_file: Path, tmp_path: Path) -> None:
    offload = "deepspeed.zero_optimization.offload_optimizer={device: nvme, nvme_path: /nvme}"
    plan = target(run_file, offload, "deepspeed.zero_optimization.stage=3")
    document = case_plan(plan, plan.layout, tmp_path).config.deepspeed.document
    assert document["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("overrides", [(), ("deepspeed.zero_optimization.stage=3",)], ids=["as it is", "ZeRO-3"])
def test_every_run_file_here_scales_down_to_its_shape(
    path: Path, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    layout = yaml.safe_load(path.read_text())["parallel"]
    ranks = layout.get("tensor", 1) * layout.get("pipeline", 1) * 2
    config = prepare(path, overrides, ranks).config
    scaled, notes = scale_down(config)
    whole, small = config.model, scaled.model
    assert scaled.layout == config.layout
    assert small.vocab_size == whole.vocab_size
    assert small.tie_word_embeddings == whole.tie_word_embeddings
    ratio = whole.num_attention_heads // whole.num_key_value_heads
    assert small.num_attention_heads == ratio * small.num_key_value_heads
    assert small.num_hidden_layers == 2 * config.placement.num_stages
    assert small.hidden_size < 257
    assert scaled.data.sequence_length == 64
    assert any(note.startswith("model.hidden_size=") for note in notes)


def scaled_model(run_file: Path, tensor: int, **model: Any) -> Any:
    overrides = [f"model.{key}={value}" for key, value in model.items()]
    return scale_down(prepare(run_file, [f"parallel.tensor={tensor}", *overrides], None).config)[0].model


def test_key_value_heads_are_copied_or_divided_as_before(run_file: Path) -> None:
    large = {"hidden_size": 1024, "num_attention_heads": 32, "head_dim": 32, "intermediate_size": 2752}
    copied = scaled_model(run_file, 8, **large, num_key_value_heads=2)
    assert (copied.num_attention_heads, copied.num_key_value_heads) == (32, 2)
    divided = scaled_model(run_file, 2, **large, num_key_value_heads=16)
    assert (divided.num_attention_heads, divided.num_key_value_heads) == (8, 4)
    single = scaled_model(run_file, 1, **large, num_key_value_heads=1)
    assert (single.num_attention_heads, single.num_key_value_heads) == (32, 1)


def test_partly_turned_heads_stay_wide_enough_to_turn(run_file: Path) -> None:
    neox = "{architecture: gpt_neox, vocab_size: 8192, hidden_size: 768, num_hidden_layers: 4, num_attention_heads: 8,"
    neox += " max_position_embeddings: 256, rotary_pct: 0.0625}"
    model = scale_down(prepare(run_file, [f"model={neox}"], None).config)[0].model
    assert model.head_dim == 32, "of 16 dims one would turn, and they turn in pairs"


def test_uneven_stages_stay_uneven(run_file: Path) -> None:
    overrides = ["parallel.pipeline=4", "model.num_hidden_layers=24", "parallel.stage_layers=[3, 9, 8, 4]"]
    scaled, notes = scale_down(prepare(run_file, overrides, None).config)
    assert scaled.parallel.stage_layers == (1, 3, 3, 2)
    assert "parallel.stage_layers=[1, 3, 3, 2], not [3, 9, 8, 4]" in notes
    scaled, _ = scale_down(prepare(run_file, [*overrides[:1], "model.num_hidden_layers=26"], None).config)
    assert [len(layers) for layers in partition(scaled.model.num_hidden_layers, 4)] == [1, 2, 2, 1]


def test_what_zero_3_gathers_scales_with_the_model(run_file: Path) -> None:
    """Norms stay below the size that ZeRO-3 keeps whole, and matrices above."""
    overrides = ["deepspeed.zero_optimization.stage=3", "model.hidden_size=2048", "model.num_attention_heads=32"]
    scaled, _ = scale_down(prepare(run_file, [*overrides, "model.intermediate_size=5504"], None).config)
    threshold = scaled.deepspeed.document["zero_optimization"]["stage3_param_persistence_threshold"]
    assert scaled.model.hidden_size < threshold < scaled.model.hidden_size**2


def test_a_batch_that_the_json_restates_scales_too(run_file: Path) -> None:
    stated = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
    overrides = ["train.global_batch_size=16", "train.micro_batch_size=4", "parallel.pipeline=1"]
    overrides += [f"deepspeed.{key}={value}" for key, value in stated.items()]
    scaled, _ = scale_down(prepare(run_file, overrides, None).config)
    assert (scaled.train.global_batch_size, scaled.train.micro_batch_size) == (4, 2)


def test_tokens_that_are_shared_out_evenly_stay_so(run_file: Path) -> None:
    overrides = ["model.num_attention_heads=3", "model.num_key_value_heads=3", "model.hidden_size=48"]
    overrides += ["model.intermediate_size=96", "parallel.tensor=3", "parallel.sequence_parallel=true"]
    scaled, _ = scale_down(prepare(run_file, [*overrides, "data.sequence_length=66"], None).config)
    assert scaled.data.sequence_length == 63


def test_a_small_run_is_left_as_it_is(run_file: Path) -> None:
    small = ["model.hidden_size=16", "model.num_attention_heads=2", "model.num_key_value_heads=2"]
    small += ["model.intermediate_size=48", "model.num_hidden_layers=2", "train.global_batch_size=2"]
    config = prepare(run_file, small, None).config
    scaled, notes = scale_down(config)
    assert notes == ()
    assert scaled.model == config.model


def test_groups_without_effect_on_the_smaller_model_are_left_out(run_file: Path) -> None:
    groups = "[{match: 'layers.30.*', frozen: true}, {match: '*norm.weight', lr_scale: 2.0}]"
    given = ["model.num_hidden_layers=32", f"train.optimizer={{lr: 0.1, groups: {groups}}}"]
    scaled, notes = scale_down(prepare(run_file, given, None).config)
    assert [group.match for group in scaled.optimizer.groups] == ["*norm.weight"]
    assert "train.optimizer.groups: the group of 'layers.30.*' left out, without effect on this model" in notes


# ------------------------------------------------------------------------------------------------------- findings


def difference(index: int, relative: float, *, factor: float = 1.0, rank: int = 0) -> ParameterDifference:
    return ParameterDifference(index, f"layers.{index}.mlp.up.weight", relative, factor, 0, rank)


def test_ranks_agree_on_the_worst_and_on_the_first_beyond_the_tolerance() -> None:
    ranks = [
        TensorComparison.of([difference(0, 1e-7), difference(2, 0.5, rank=0)], 1e-5),
        TensorComparison.of([difference(1, 2e-5, rank=1), difference(3, float("nan"), rank=1)], 1e-5),
        TensorComparison.of([difference(1, 3e-5, rank=2)], 1e-5),
        TensorComparison.of([], 1e-5),
    ]
    joined = TensorComparison.over_ranks(ranks)
    assert joined.first == difference(1, 3e-5, rank=2)
    assert joined.worst is not None
    assert joined.worst.index == 3, "what is no number is worse than any"
    assert joined.differing == (1, 2, 3)


def finding(**changes: Any) -> ParityReport:
    fine = TensorComparison.of([difference(0, 0.0)], 0.0)
    settings: dict[str, Any] = {"parameters": 9, "elements_missing": 0, "loss": 2.0, "reference_loss": 2.0}
    settings |= {"norm": 1.0, "reference_norm": 1.0, "start": fine, "gradients": fine, "update": fine}
    return ParityReport(**(settings | changes))


def test_a_finding_goes_through_its_file(tmp_path: Path) -> None:
    written = finding(loss=float("inf"), gradients=TensorComparison.of([difference(0, float("inf"), factor=0.0)], 1e-5))
    written.write(tmp_path / "finding.json")
    assert ParityReport.read(tmp_path / "finding.json") == written
    assert ParityReport.read(tmp_path / "nothing.json") is None
    assert set(asdict(written)) == set(ParityReport.__slots__)


def test_words_say_causes_first_and_what_agrees() -> None:
    assert finding().agrees
    assert list(finding(elements_missing=32).differences()) == ["the ranks update 32 elements fewer than the model has"]
    assert list(finding(loss=2.1).differences()) == ["loss differs: 2.1, in one process 2"]
    assert not finding(loss=float("nan")).agrees
    for value in (float("nan"), float("inf")):  # equal in both, and no proof
        assert not finding(loss=value, reference_loss=value).agrees
        assert not finding(norm=value, reference_norm=value).agrees
    doubled = [difference(2, 1.0, factor=2.0), difference(4, 3.0, rank=1)]
    both = finding(gradients=TensorComparison.of(doubled, 1e-5), norm=1.5)
    assert list(both.differences()) == [
        "gradients of layers.2.mlp.up.weight on stage 0, rank 0 differ by 1.0e+00, 2.00 times those of one process; "
        "so do those of 1 more of 9 parameters, most layers.4.mlp.up.weight on stage 0, rank 1, by 3.0e+00",
        "global norm differs: 1.5, in one process 1",
    ]
    assert both.agreeing() == ["weights before the step", "loss", "the update by this layout's gradients"]
    assert finding(loss=2.1).agreeing()[-1] == "weights after the step"
