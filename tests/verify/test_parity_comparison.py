"""What `megalite verify` compares: right code agrees at every layout, and every broken build is caught and named."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from training import TINY_MODEL, build_trainer

from megalite.checkpoint.fragments import Fragment
from megalite.model.stage import Stage
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.mesh import Mesh, build_mesh
from megalite.parallel.sharding import local_shards
from megalite.tensor_parallel.init import initialise_parameter
from megalite.verify.parity_report import GRADIENT_TOLERANCE, UPDATE_TOLERANCE, ParityReport

TINY = (*TINY_MODEL, "train.global_batch_size=8")
GPT2 = (
    "model={architecture: gpt2, vocab_size: 256, hidden_size: 32, num_hidden_layers: 4, num_attention_heads: 4,"
    " max_position_embeddings: 24}"
)
NEOX = GPT2.replace("gpt2", "gpt_neox").replace("hidden_size: 32", "hidden_size: 64")


right_initialise = Stage.initialise

# ------------------------------------------------------------------------------------------------- broken builds


def forget_the_tied_gradient(mesh: Mesh, trainer: Any) -> None:
    trainer.engine.mesh = replace(mesh, embedding=None)


def count_a_norm_twice(mesh: Mesh, trainer: Any) -> None:
    for stage in trainer.engine.stages.values():
        for placed in stage.placed_parameters:
            if placed.shards[0].spec.name == "final_norm.weight":
                placed.parameter.model_parallel = True


def count_every_norm_twice(mesh: Mesh, trainer: Any) -> None:
    for stage in trainer.engine.stages.values():
        for parameter in stage.parameters():
            parameter.model_parallel = True


def send_another_microbatch(mesh: Mesh, trainer: Any) -> None:
    if mesh.pipeline.rank == 0:
        (channel,) = trainer.executor.outgoing.values()
        send, before = channel.send, []

        def send_the_one_before(tensors: Any, edge: Any) -> None:
            before.append(tensors)
            send(before[-2] if len(before) == 2 else tensors, edge)

        channel.send = send_the_one_before


def average_nothing_at_stage_0(mesh: Mesh, trainer: Any) -> None:
    trainer.engine.engine.allreduce_gradients = lambda: None


def average_nothing_at_stage_2(mesh: Mesh, trainer: Any) -> None:
    trainer.engine.zero_optimizer.average_tensor = lambda *arguments, **settings: None


def decay_twice(mesh: Mesh, trainer: Any) -> None:
    """An optimizer that decays twice as much: nothing but the weights after the step shows it."""
    for group in trainer.engine.optimizer.param_groups:
        group["weight_decay"] *= 2


def lose_a_parameter(mesh: Mesh, trainer: Any) -> None:
    """An optimizer that was never given one of them."""
    fragments, gradients = trainer.state.fragments, trainer.state.gradients
    trainer.state.fragments = lambda: (each for each in fragments() if not is_final_norm(each))
    trainer.state.gradients = lambda: (each for each in gradients() if not is_final_norm(each))


def is_final_norm(fragment: Fragment) -> bool:
    return fragment.shards[0].spec.name == "final_norm.weight"


def initialise_from_another_slice(stage: Stage, seed: int) -> None:
    """What rank 1 does in place of `Stage.initialise`: one matrix is the part of rank 0."""
    right_initialise(stage, seed)
    for placed in stage.placed_parameters:
        if placed.shards[0].spec.name == "layers.2.mlp.down.weight":
            of_rank_0 = local_shards([shard.spec for shard in placed.shards], {"tensor": (0, stage.group.size)})
            initialise_parameter(placed.parameter, of_rank_0, seed=seed, std=stage._residual_std)


# ------------------------------------------------------------------------------------------------------- on ranks


def verified(
    path: str,
    layout: tuple[int, int, int],
    overrides: tuple[str, ...],
    sabotage: Callable[[Mesh, Any], None] | None = None,
    initialise: Callable[[Stage, int], None] | None = None,
) -> ParityReport:
    """Compare one layout, as `verify_layout` does, over ranks whose code may have been broken."""
    from megalite.data.datasets import open_datasets
    from megalite.planning.plan import prepare
    from megalite.training.trainer import Trainer
    from megalite.verify.comparison import compare
    from megalite.verify.layouts import case_plan
    from megalite.verify.reference import Reference

    target = prepare(Path(path), overrides, None)
    plan = case_plan(target, ParallelLayout(*layout), target.config.run.dir)
    rank = dist.get_rank()
    timeout = timedelta(seconds=60)
    mesh = build_mesh(plan.layout, rank, device=torch.device("cpu"), timeout=timeout, placement=plan.placement)
    datasets = open_datasets(plan.config)
    if initialise is not None and rank == 1:
        Stage.initialise = initialise  # pyright: ignore[reportAttributeAccessIssue]
    trainer = Trainer(plan, mesh, datasets)
    reference = Reference(plan, datasets, mesh.device, trainer.kernels) if rank == 0 else None
    if sabotage is not None:
        sabotage(mesh, trainer)
    finding = compare(trainer, reference)
    trainer.close()
    return finding


def verify(
    run_file: Path, layout: tuple[int, int, int], *overrides: str, stage: int, tied: bool = True, **broken: Any
) -> ParityReport:
    """Return what every rank found alike."""
    settings = (
        *TINY,
        f"model.tie_word_embeddings={str(tied).lower()}",
        *overrides,
        f"deepspeed.zero_optimization.stage={stage}",
    )
    world_size = layout[0] * layout[1] * layout[2]
    found = run_distributed(verified, world_size, str(run_file), layout, settings, *broken.values())
    assert all(finding == found[0] for finding in found)
    return found[0]


def assert_agrees(finding: ParityReport) -> None:
    assert list(finding.differences()) == []
    # A fifth of the tolerance: what rounding makes of right code stays well away from it.
    assert finding.gradients.worst is not None
    assert finding.update.worst is not None
    assert finding.gradients.worst.relative < GRADIENT_TOLERANCE / 5
    assert finding.update.worst.relative < UPDATE_TOLERANCE / 5


LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)]


@pytest.mark.parametrize(
    ("layout", "stage", "tied"),
    [((2, 1, 1), 1, True), ((1, 2, 1), 2, False), ((1, 1, 2), 3, True), ((2, 2, 1), 0, True), ((1, 2, 2), 1, True)],
)
def test_right_code_agrees(run_file: Path, layout: tuple[int, int, int], stage: int, tied: bool) -> None:
    assert_agrees(verify(run_file, layout, stage=stage, tied=tied))


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_right_code_agrees_at_every_layout_and_zero_stage(
    run_file: Path, layout: tuple[int, int, int], tied: bool, stage: int
) -> None:
    assert_agrees(verify(run_file, layout, stage=stage, tied=tied))


FAMILIES = {
    "gpt2": (GPT2,),
    "gpt_neox": (NEOX,),
    "biased keys": ("model.attention_bias=true", "model.qk_norm=true"),
    "packed": ("data.reset_attention_mask=true", "data.reset_position_ids=true", "data.eod_mask_loss=true"),
    "gpipe, uneven": ("parallel.schedule=gpipe", "parallel.pipeline=2", "parallel.stage_layers=[3, 1]"),
    "two stages a rank": ("parallel.schedule=interleaved_1f1b", "parallel.pipeline=2", "parallel.virtual_stages=2"),
    "zero bubble": ("parallel.schedule=zb_h1", "parallel.pipeline=2"),
    "both ends on a rank": ("parallel.schedule=zb_v", "parallel.pipeline=2", "parallel.virtual_stages=2"),
    "ramp-up": ("train.batch_size_rampup={start: 4, increment: 4, samples: 8}",),
    "offloaded": ("deepspeed.zero_optimization.offload_optimizer={device: cpu}",),
    "bf16": ("deepspeed.bf16={enabled: true}",),
}


@pytest.mark.parametrize(
    ("family", "layout", "stage"),
    [("gpt2", (2, 1, 1), 1), ("packed", (1, 2, 1), 2), ("offloaded", (1, 1, 2), 1), ("bf16", (2, 1, 1), 2)]
    + [("two stages a rank", (1, 2, 1), 1), ("both ends on a rank", (1, 2, 1), 3)],
)
def test_right_code_agrees_on_every_kind_of_run(
    run_file: Path, family: str, layout: tuple[int, int, int], stage: int
) -> None:
    assert_agrees(verify(run_file, layout, *FAMILIES[family], stage=stage))


GROUPS = "groups: [{match: 'embedding.*', frozen: true}, {match: 'layers.[01].*', frozen: true}, "
GROUPS += "{match: 'layers.3.*', lr_scale: 0.5, weight_decay: 0.3}]"
OPTIMIZERS = {
    "frozen and groups": f"train.optimizer={{name: adamw, lr: 1.0e-3, weight_decay: 0.1, {GROUPS}}}",
    "lion": "train.optimizer={name: lion, lr: 1.0e-3, weight_decay: 0.1}",
}


@pytest.mark.parametrize(
    ("settings", "layout", "stage"),
    [
        ("frozen and groups", (2, 2, 1), 1),
        ("frozen and groups", (1, 2, 2), 2),
        ("frozen and groups", (1, 1, 2), 3),
        ("lion", (1, 1, 2), 2),
    ],
)
def test_right_code_agrees_on_other_optimizers_and_groups(
    run_file: Path, settings: str, layout: tuple[int, int, int], stage: int
) -> None:
    assert_agrees(verify(run_file, layout, OPTIMIZERS[settings], stage=stage, tied=False))


def decay_frozen_weights(mesh: Mesh, trainer: Any) -> None:
    def step(rate: float | None) -> Any:
        for stage in trainer.engine.stages.values():
            for parameter in stage.parameters():
                if not parameter.requires_grad:
                    parameter.data.mul_(0.9)
        return right_step(rate)

    right_step, trainer.engine.step = trainer.engine.step, step


def test_a_frozen_weight_that_changes_is_named(run_file: Path) -> None:
    settings = OPTIMIZERS["frozen and groups"]
    found = verify(run_file, (1, 2, 1), settings, stage=1, tied=False, sabotage=decay_frozen_weights)
    assert found.update.first is not None
    assert found.update.first.name == "embedding.tokens.weight"


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2)], ids=lambda layout: "x".join(map(str, layout)))
def test_right_code_agrees_on_every_kind_of_run_at_every_zero_stage(
    run_file: Path, family: str, layout: tuple[int, int, int], stage: int
) -> None:
    assert_agrees(verify(run_file, layout, *FAMILIES[family], stage=stage))


# ------------------------------------------------------------------------------------------------ what is caught


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_tied_gradient_that_is_not_summed_is_named(run_file: Path, stage: int) -> None:
    found = verify(run_file, (1, 2, 1), stage=stage, sabotage=forget_the_tied_gradient)
    assert found.gradients.first is not None
    assert found.gradients.first.name == "embedding.tokens.weight"
    assert found.gradients.differing == (0,), "the other gradients are as they should be"
    assert found.agreeing()[:2] == ["weights before the step", "loss"]


# Tokens that stand for much: the norms' share of the global norm is large enough to matter.
LARGE_SHARE = "model.initializer_range=0.1"


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize(
    ("sabotage", "name"),
    [
        (count_a_norm_twice, "final_norm.weight"),
        (count_every_norm_twice, "parameters replicated over the tensor ranks"),
    ],
)
def test_norms_counted_twice_are_named(run_file: Path, stage: int, sabotage: Any, name: str) -> None:
    found = verify(run_file, (2, 1, 1), LARGE_SHARE, stage=stage, sabotage=sabotage)
    assert not found.agrees
    assert found.miscounted == f"{name} were counted more than once"
    assert found.agreeing()[:3] == ["weights before the step", "loss", "gradients"]


def test_a_wrong_send_is_caught(run_file: Path) -> None:
    found = verify(run_file, (1, 2, 1), stage=1, sabotage=send_another_microbatch)
    assert found.agreeing() == ["weights before the step", "the update by this layout's gradients"]


def test_a_shard_from_another_slice_is_named(run_file: Path) -> None:
    found = verify(run_file, (2, 1, 1), stage=1, sabotage=None, initialise=initialise_from_another_slice)
    assert found.start.first is not None
    assert (found.start.first.name, found.start.first.rank) == ("layers.2.mlp.down.weight", 1)
    assert len(found.start.differing) == 1
    assert next(found.differences()).startswith(
        "weights before the step of layers.2.mlp.down.weight on stage 0, rank 1 differ by "
    )


@pytest.mark.parametrize(("stage", "sabotage"), [(0, average_nothing_at_stage_0), (2, average_nothing_at_stage_2)])
def test_gradients_that_are_not_averaged_over_data_are_caught(run_file: Path, stage: int, sabotage: Any) -> None:
    found = verify(run_file, (1, 1, 2), stage=stage, sabotage=sabotage)
    assert len(found.gradients.differing) == found.parameters
    assert found.agreeing()[:2] == ["weights before the step", "loss"]


def test_an_optimizer_of_another_kind_is_caught(run_file: Path) -> None:
    found = verify(run_file, (1, 1, 2), stage=1, sabotage=decay_twice)
    assert found.agreeing() == ["weights before the step", "loss", "gradients", "global norm"]
    assert found.update.differing


@pytest.mark.parametrize("stage", [0, 1])
def test_a_parameter_that_nobody_updates_is_missed(run_file: Path, stage: int) -> None:
    found = verify(run_file, (1, 2, 1), stage=stage, sabotage=lose_a_parameter)
    assert list(found.differences()) == ["the ranks update 32 elements fewer than the model has"]


def save_at_once(path: str, overrides: tuple[str, ...]) -> None:
    trainer = build_trainer(path, overrides)
    trainer.step(1)
    trainer.save(1)
    trainer.close()


def test_right_code_agrees_from_weights_that_are_read(run_file: Path, tmp_path: Path) -> None:
    run_distributed(save_at_once, 1, str(run_file), (*TINY, "checkpoint.every=1"))
    saved = f"init_from={tmp_path / 'run' / 'checkpoints' / 'step_1'}"
    assert_agrees(verify(run_file, (1, 2, 1), saved, stage=1))
