"""Gradients of a step are added up in fp32, whatever the precision of the parameters: over microbatches and ranks."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from harness import run_distributed
from torch import Tensor
from training import build_trainer

from megalite.data.collate import SampleRules
from megalite.data.datasets import open_datasets
from megalite.kernels.choice import Kernels
from megalite.model.stage import Stage
from megalite.parallel.regions import Region
from megalite.parallel.tensor_group import TensorGroup
from megalite.planning.plan import prepare
from megalite.training.microbatches import to_device

if TYPE_CHECKING:
    from megalite.training.trainer import Trainer

MICROBATCHES = 64
SMALL = (
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=48",
    "data.sequence_length=24",
    f"train.global_batch_size={MICROBATCHES}",
    # Without memory AdamW's first moment is the gradient itself.
    "train.optimizer={name: adamw, lr: 1.0e-3, betas: [0.0, 0.0], weight_decay: 0.0}",
    "deepspeed.gradient_clipping=0.0",
)
PRECISIONS = {"bf16": "{enabled: true}", "fp16": "{enabled: true, initial_scale_power: 8}"}
# One way on every machine, which no machine is slow in: what is compared rounds at the same places.
KERNELS = Kernels(products="fp32", attention="fused")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def overrides_of(layout: tuple[int, int, int], stage: int, precision: str) -> tuple[str, ...]:
    return (
        *SMALL,
        *(f"train.cpu_{name}={way}" for name, way in asdict(KERNELS).items()),
        *(f"deepspeed.{name}={switch}" for name, switch in PRECISIONS.items() if name == precision),
        f"deepspeed.zero_optimization.stage={stage}",
        *(f"parallel.{axis}={n}" for axis, n in zip(("tensor", "pipeline", "data"), layout, strict=True)),
    )


def gradients_of_a_step(path: str, overrides: tuple[str, ...]) -> tuple[float, list[tuple[str, Region, Tensor]]]:
    """The norm that a step tells, and what AdamW was given on this rank: (name, region, elements)."""
    trainer = build_trainer(path, overrides)
    norm = trainer.step(1).outcome.grad_norm
    held = first_moments(trainer)
    trainer.close()
    return norm, held


def first_moments(trainer: "Trainer") -> list[tuple[str, Region, Tensor]]:
    held = []
    for fragment in trainer.engine.state.fragments():
        flat = fragment.tensors["exp_avg"]
        assert flat.dtype == torch.float32
        for part in fragment.regions(0, fragment.numel):
            elements = flat[part.start : part.start + part.region.numel].view(part.region.shape)
            held.append((part.name, part.region, elements.clone()))
    return held


def accumulated_in_fp32(path: Path, overrides: tuple[str, ...], precision: str, data: int) -> dict[str, Tensor]:
    """The mean of the microbatches' gradients in half precision, in one process of plain torch.

    What falls below fp16's smallest number depends on the scale, and so on how many ranks divide the microbatches.
    """
    scale = 2.0**8 * data / MICROBATCHES
    plan = prepare(path, (*overrides, "parallel.tensor=1", "parallel.pipeline=1", "parallel.data=1"), 1)
    model = Stage(plan.config.model, range(4), index=0, num_stages=1, group=TensorGroup(kernels=KERNELS))
    model.initialise(plan.config.run.seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
        # A norm's weight multiplies fp32, and its gradient comes in fp32; torch would round it.
        parameter.grad_dtype = torch.float32  # pyright: ignore[reportAttributeAccessIssue]
    samples, rules = open_datasets(plan.config).train, SampleRules()
    sums: dict[str, Tensor] = {}
    for sample in range(MICROBATCHES):
        batch = rules.microbatch(samples, range(sample, sample + 1))
        model.zero_grad()
        loss = model({}, microbatch=to_device(batch, torch.device("cpu"))).losses["loss"]
        (loss * scale).backward()
        for placed in model.placed_parameters:
            assert placed.parameter.grad is not None
            for shard in placed.shards:
                gradient = placed.parameter.grad[shard.target.slices] / (scale * MICROBATCHES)
                sums[shard.spec.name] = sums.get(shard.spec.name, 0.0) + gradient
    return sums


def worst_error(
    ranks: list[tuple[float, list[tuple[str, Region, Tensor]]]], exact: dict[str, Tensor]
) -> dict[str, float]:
    """The distance from the exact gradient of each tensor, and of all, as a share of its norm."""
    errors = {name: torch.zeros_like(tensor) for name, tensor in exact.items()}
    seen = {name: torch.zeros_like(tensor) for name, tensor in exact.items()}
    for _, held in ranks:
        for name, region, elements in held:
            errors[name][region.slices] = elements - exact[name][region.slices]
            seen[name][region.slices] = 1.0
    assert all(bool(tensor.all()) for tensor in seen.values())
    shares = {name: float(errors[name].norm() / exact[name].norm()) for name in exact}
    total = torch.stack([tensor.norm() for tensor in errors.values()]).norm()
    return shares | {"whole": float(total / torch.stack([tensor.norm() for tensor in exact.values()]).norm())}


CASES = [
    ((1, 1, 1), 1, "bf16", None),
    ((1, 1, 2), 1, "bf16", None),
    ((1, 2, 2), 1, "bf16", "optimizer"),
    ((1, 2, 2), 2, "bf16", None),
    ((1, 2, 2), 2, "fp16", "optimizer"),
    ((1, 2, 2), 3, "bf16", None),
    ((1, 2, 2), 3, "fp16", None),
    ((1, 1, 2), 3, "bf16", "both"),
]
FULL = [
    (layout, stage, precision, offload)
    for layout in ((1, 1, 2), (1, 2, 2))
    for stage in (1, 2, 3)
    for precision in PRECISIONS
    for offload in (None, "optimizer", "both")
    if (layout, stage, precision, offload) not in CASES and (offload != "both" or stage == 3)
]


@pytest.mark.parametrize(
    ("layout", "stage", "precision", "offload"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)],
)
def test_microbatches_add_up_as_in_fp32(
    run_file: Path, layout: tuple[int, int, int], stage: int, precision: str, offload: str | None
) -> None:
    overrides = overrides_of(layout, stage, precision)
    # A table that is tied within one stage gets its two gradients from autograd as one, rounded once.
    overrides += ("model.tie_word_embeddings=false",)
    if offload is not None:
        overrides += ("deepspeed.zero_optimization.offload_optimizer={device: cpu}",)
    if offload == "both":
        overrides += ("deepspeed.zero_optimization.offload_param={device: cpu}",)
    ranks = run_distributed(gradients_of_a_step, layout[1] * layout[2], str(run_file), overrides)
    exact = accumulated_in_fp32(run_file, overrides, precision, layout[2])
    for name, error in worst_error(ranks, exact).items():
        # Rounding the sums but once, to fp16, is 1e-4.
        assert error < 1e-5, f"{name} is off by {error:.2e}"
    norm = float(torch.stack([tensor.double().norm() for tensor in exact.values()]).norm())
    assert all(abs(rank_norm / norm - 1) < 1e-5 for rank_norm, _ in ranks)


QUICK = [(0, "fp32"), (2, "bf16"), (3, "bf16")]
EVERY = [
    pytest.param(stage, precision, marks=() if (stage, precision) in QUICK else pytest.mark.full)
    for stage, precision in [*((stage, "fp32") for stage in range(4)), *((stage, "bf16") for stage in (1, 2, 3))]
]


@pytest.mark.parametrize(("stage", "precision"), EVERY)
def test_gradients_that_are_handed_over_count_as_autograds_own(run_file: Path, stage: int, precision: str) -> None:
    """A backward in halves hands the gradients of matrices over. With a tied table: on the first stage autograd finds a
    gradient there, on the last the hand-over is the first."""
    overrides = overrides_of((1, 2, 2), stage, precision)
    own, handed = (
        run_distributed(gradients_of_a_step, 4, str(run_file), (*overrides, f"parallel.schedule={schedule}"))
        for schedule in ("1f1b", "zb_h1")
    )
    for (own_norm, expected), (handed_norm, found) in zip(own, handed, strict=True):
        assert abs(handed_norm / own_norm - 1) < 1e-6
        for (name, region, elements), (same_name, same_region, same_elements) in zip(expected, found, strict=True):
            assert (name, region) == (same_name, same_region)
            torch.testing.assert_close(same_elements, elements, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_less_memory_is_taken_where_it_is_asked_for(run_file: Path, stage: int) -> None:
    """And is seen in the gradients: the test above would notice."""
    overrides = (*overrides_of((1, 1, 2), stage, "bf16"), "deepspeed.data_types={grad_accum_dtype: bf16}")
    overrides += ("model.tie_word_embeddings=false",)
    ranks = run_distributed(gradients_of_a_step, 2, str(run_file), overrides)
    errors = worst_error(ranks, accumulated_in_fp32(run_file, overrides, "bf16", 2))
    assert 2e-3 < errors["whole"] < 0.1


def test_the_copies_of_a_tied_table_are_added_in_fp32(run_file: Path) -> None:
    """The two stages' gradients of one table, each summed as they are where the table stands on one stage alone."""
    overrides = overrides_of((1, 2, 1), 1, "bf16")
    ranks = run_distributed(gradients_of_a_step, 2, str(run_file), overrides)
    exact = accumulated_in_fp32(run_file, overrides, "bf16", 1)
    errors = worst_error(ranks, exact)
    assert errors["embedding.tokens.weight"] < 1e-3
