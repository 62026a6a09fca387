"""The optimizer's state, as ZeRO divides it, is that of one process under global names."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_distributed
from replicas import divided_replicas, whole_replicas
from training import NARROW, build_trainer, unchanged

from megalite.parallel.regions import Region
from megalite.planning.plan import Plan

STEPS = 3
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2)]


def state_after_training(
    path: str, overrides: list[str], replan: Callable[[Plan], Plan]
) -> tuple[int, list[tuple[str, str, Region, np.ndarray]]]:
    """Train some steps; return how many weights this rank saves, and (kind, name, region, elements) of its updates."""
    trainer = build_trainer(path, overrides, replan=replan)
    for step in range(1, STEPS + 1):
        trainer.step(step)
    saved, held = 0, []
    for number, fragment in enumerate(trainer.engine.state.fragments()):
        saved += sum(part.region.numel for part in fragment.regions(*fragment.share(number)))
        for kind, flat in fragment.tensors.items():
            assert flat.dtype == torch.float32
            for part in fragment.regions(0, fragment.numel):
                elements = flat[part.start : part.start + part.region.numel].view(part.region.shape)
                held.append((kind, part.name, part.region, elements.numpy().copy()))
    trainer.close()
    return saved, held


def assembled(
    run_file: Path, layout: tuple[int, int, int], *overrides: str, replan: Callable[[Plan], Plan] = unchanged
) -> dict[tuple[str, str], np.ndarray]:
    """The state of all ranks as global tensors; what several hold must agree, and nothing may be missing.

    Over all ranks every weight is saved once.
    """
    place_of = [f"parallel.{axis}={n}" for axis, n in zip(("tensor", "pipeline", "data"), layout, strict=True)]
    ranks = run_distributed(state_after_training, int(np.prod(layout)), str(run_file), [*overrides, *place_of], replan)
    pieces = [piece for _, held in ranks for piece in held]
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for kind, name, region, _ in pieces:
        corner = tuple(np.add(region.offset, region.shape).tolist())
        shapes[kind, name] = tuple(map(max, shapes.get((kind, name), corner), corner))
    tensors = {key: np.full(shape, np.nan, np.float32) for key, shape in shapes.items()}
    for kind, name, region, elements in pieces:
        region = tensors[kind, name][region.slices]
        known = ~np.isnan(region)
        np.testing.assert_array_equal(region[known], elements[known], err_msg=f"{kind} of {name}, held twice")
        region[...] = elements
    assert not any(np.isnan(tensor).any() for tensor in tensors.values())
    weights = sum(tensor.size for (kind, _), tensor in tensors.items() if kind == "weight")
    assert sum(saved for saved, _ in ranks) == weights
    return tensors


@cache
def state_of_one_process(corpus: Path, content: str, overrides: tuple[str, ...]) -> dict[tuple[str, str], np.ndarray]:
    path = corpus.parent / "one_process.yaml"
    path.write_text(content)
    return assembled(path, (1, 1, 1), *overrides, f"run.dir={corpus.parent}", "deepspeed.zero_optimization.stage=0")


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.full) for stage in (1, 2)), 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_the_state_is_that_of_one_process(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], stage: int
) -> None:
    check(run_file, corpus, layout, stage, unchanged)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("replan", [whole_replicas, divided_replicas])
def test_the_state_of_replicas_is_that_of_one_process(
    run_file: Path, corpus: Path, stage: int, replan: Callable[[Plan], Plan]
) -> None:
    check(run_file, corpus, (1, 1, 4), stage, replan)


def check(
    run_file: Path, corpus: Path, layout: tuple[int, int, int], stage: int, replan: Callable[[Plan], Plan]
) -> None:
    # With its usual epsilon AdamW moves a weight of no gradient to speak of by its sign, which is noise.
    optimizer = "train.optimizer={name: adamw, lr: 5.0e-4, betas: [0.9, 0.95], eps: 1.0e-3, weight_decay: 0.1}"
    overrides = (*NARROW, "model.num_hidden_layers=2", "model.vocab_size=300", optimizer)
    expected = state_of_one_process(corpus, run_file.read_text().replace(str(run_file.parent), ""), overrides)
    found = assembled(run_file, layout, *overrides, f"deepspeed.zero_optimization.stage={stage}", replan=replan)
    assert {kind for kind, _ in found} == {"weight", "exp_avg", "exp_avg_sq"}
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(
            torch.from_numpy(tensor),
            torch.from_numpy(expected[key]),
            rtol=1e-4,
            atol=1e-6,
            msg=lambda m, k=key: f"{k}: {m}",
        )
