"""Checkpoints follow from what an optimizer declares: other optimizers, and parameters without any state."""

import json
from pathlib import Path

import numpy as np
import pytest
from harness import RankError
from resuming import PAIR, SMALL, Layout, assert_same_run, at, run, trained
from training import train_in_plain_torch

from megalite.checkpoint.reader import CheckpointReader
from megalite.config import load_run_config
from megalite.model.stage import Stage
from megalite.parallel.regions import Region
from megalite.parallel.tensor_group import TensorGroup
from megalite.planning.plan import prepare

BF16 = "deepspeed.bf16={enabled: true}"
ADAMW = "name: adamw, lr: 2.0e-3, betas: [0.9, 0.95], weight_decay: 0.1"
FROZEN = f"train.optimizer={{{ADAMW}, groups: [{{match: 'layers.0.*', frozen: true}}]}}"
LION = "train.optimizer={name: lion, lr: 5.0e-4, betas: [0.9, 0.95], weight_decay: 0.5}"
ONE: Layout = (1, 1, 1)


def held(checkpoint: Path, name: str) -> np.ndarray:
    reader = CheckpointReader(checkpoint)
    shape = reader.manifest.tensors[name].shape
    out = np.empty(shape, np.float32)
    reader.read(name, Region.whole(shape), out)
    return out


def initial(run_file: Path) -> dict[str, np.ndarray]:
    """Each parameter of the small model as it is drawn from the seed; none is fused here."""
    config = load_run_config(run_file, SMALL)
    stage = Stage(config.model, range(2), index=0, num_stages=1, group=TensorGroup())
    stage.initialise(config.run.seed)
    whole = (placed for placed in stage.placed_parameters if len(placed.shards) == 1)
    return {placed.shards[0].spec.name: placed.parameter.detach().numpy() for placed in whole}


@pytest.mark.parametrize(
    ("layout", "stage", "more"),
    [
        ((1, 2, 1), 0, []),
        ((2, 1, 1), 1, [BF16, "checkpoint.async=true"]),
        ((1, 1, 2), 2, []),
        ((1, 1, 2), 3, []),
        ((1, 2, 2), 3, [BF16]),
    ],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_a_frozen_block_trains_saves_and_resumes(
    run_file: Path, tmp_path: Path, layout: Layout, stage: int, more: list[str]
) -> None:
    overrides = [*at(layout, stage), FROZEN, *more]
    run(run_file, tmp_path / "whole", layout, *overrides)
    run(run_file, tmp_path / "cut", layout, *overrides, "train.stop_after=3")
    assert run(run_file, tmp_path / "cut", layout, *overrides)[0] == 3
    assert_same_run(tmp_path / "cut", tmp_path / "whole")

    checkpoint = tmp_path / "cut/checkpoints/step_6"
    tensors, start = CheckpointReader(checkpoint).manifest.tensors, initial(run_file)
    names = {name.removeprefix("weight/") for name in tensors if name.startswith("weight/")}
    trained_names = {name for name in names if not name.startswith("layers.0.")}
    assert {name for name in tensors if not name.startswith("weight/")} == {
        f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in trained_names
    }
    for name, value in start.items():
        rounded = value if BF16 not in more else (value.view(np.uint32) + 0x7FFF + (value.view(np.uint32) >> 16 & 1))
        rounded = rounded if BF16 not in more else (rounded & 0xFFFF0000).astype(np.uint32).view(np.float32)
        unchanged = np.array_equal(held(checkpoint, f"weight/{name}"), rounded)
        assert unchanged == name.startswith("layers.0."), name


def test_frozen_parameters_go_to_any_other_layout(run_file: Path, tmp_path: Path) -> None:
    first: Layout = (2, 2, 1)
    run(run_file, tmp_path / "run", first, *at(first, 3), FROZEN, "train.stop_after=3")
    expected = train_in_plain_torch(run_file, [*SMALL, FROZEN]).losses
    for layout, stage in ((PAIR, 2), (ONE, 0)):
        run(run_file, tmp_path / "run", layout, *at(layout, stage), FROZEN, "checkpoint.every=0")
        found = [float.fromhex(loss) for _, loss, *_ in trained(tmp_path / "run")]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_optimizer_that_declares_another_state_resumes_on_another_layout(run_file: Path, tmp_path: Path) -> None:
    first: Layout = (2, 2, 1)
    run(run_file, tmp_path / "run", first, *at(first, 1), LION, "train.stop_after=3")
    manifest = CheckpointReader(tmp_path / "run/checkpoints/step_3").manifest
    assert manifest.trained_by == "lion"
    assert manifest.optimizer is not None
    assert manifest.optimizer.hyperparameters["betas"] == [0.9, 0.95]
    assert {name.partition("/")[0] for name in manifest.tensors} == {"weight", "exp_avg"}

    assert run(run_file, tmp_path / "run", PAIR, *at(PAIR, 2), LION)[0] == 3
    expected = train_in_plain_torch(run_file, [*SMALL, LION])
    found = trained(tmp_path / "run")
    np.testing.assert_allclose([float.fromhex(loss) for _, loss, *_ in found], expected.losses, rtol=1e-5)
    np.testing.assert_allclose([float.fromhex(str(norm)) for _, _, norm, _ in found], expected.norms, rtol=1e-5)


REFUSED = [
    (LION, FROZEN, r"holds the optimizer state of 'lion', and train.optimizer.name='adamw'; .*init_from=\S+step_3 and"),
    (FROZEN, LION, "holds the optimizer state of 'adamw', and train.optimizer.name='lion'"),
]


@pytest.mark.parametrize(("before", "after", "message"), REFUSED)
def test_the_state_of_another_optimizer_is_refused(
    run_file: Path, tmp_path: Path, before: str, after: str, message: str
) -> None:
    run(run_file, tmp_path / "run", ONE, *at(ONE, 1), before, "train.stop_after=3")
    with pytest.raises(RankError, match=message):
        run(run_file, tmp_path / "run", ONE, *at(ONE, 1), after)
    folder = tmp_path / "run/checkpoints/step_3"
    start = [after, f"init_from={folder}", "train.stop_after=1"]
    assert run(run_file, tmp_path / "tuned", ONE, *at(ONE, 1), *start)[0] == 0


def test_other_frozen_parameters_are_refused_in_both_directions(run_file: Path, tmp_path: Path) -> None:
    whole = f"train.optimizer={{{ADAMW}}}"
    run(run_file, tmp_path / "frozen", ONE, *at(ONE, 1), FROZEN, "train.stop_after=3")
    run(run_file, tmp_path / "whole", ONE, *at(ONE, 1), whole, "train.stop_after=3")
    with pytest.raises(RankError, match="norm.weight is trained in this run and was frozen .*, and 8 more differ; "):
        run(run_file, tmp_path / "frozen", ONE, *at(ONE, 1), whole)
    with pytest.raises(RankError, match="is frozen in this run and was trained .* with init_from="):
        run(run_file, tmp_path / "whole", ONE, *at(ONE, 1), FROZEN)


def test_a_checkpoint_that_names_no_optimizer_is_adamws(run_file: Path, tmp_path: Path) -> None:
    run(run_file, tmp_path / "run", ONE, *at(ONE, 1), "train.stop_after=3")
    path = tmp_path / "run/checkpoints/step_3/manifest.json"
    content = json.loads(path.read_text())
    del content["optimizer"]
    path.write_text(json.dumps(content))
    assert CheckpointReader(path.parent).manifest.trained_by == "adamw"
    assert run(run_file, tmp_path / "run", ONE, *at(ONE, 1))[0] == 3


@pytest.mark.parametrize(("settings", "tensors"), [(LION, 1), (f"train.optimizer={{{ADAMW}}}", 2), (FROZEN, 2)])
def test_the_bytes_of_a_checkpoint_are_told_before(run_file: Path, tmp_path: Path, settings: str, tensors: int) -> None:
    run(run_file, tmp_path / "run", ONE, *at(ONE, 1), settings, "train.stop_after=3")
    plan = prepare(run_file, [*SMALL, settings], 1)
    reader = CheckpointReader(tmp_path / "run/checkpoints/step_3")
    elements = sum(int(np.prod(tensor.shape)) for tensor in reader.manifest.tensors.values())
    assert plan.checkpoint_bytes == 4 * elements
    assert len(plan.requirements.optimizer.state_tensors) == tensors
