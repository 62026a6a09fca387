"""What many ranks write is one checkpoint, there whole or not at all, and read in any other cut."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from megalite.checkpoint import store
from megalite.checkpoint.boxes import Box
from megalite.checkpoint.manifest import Manifest
from megalite.checkpoint.reader import CheckpointReader, checkpoints
from megalite.checkpoint.safetensors_file import file_record, write_safetensors
from megalite.checkpoint.store import Part
from megalite.checkpoint.weights import CheckpointWeights
from megalite.errors import UserError

WEIGHT = np.arange(35, dtype=np.float32).reshape(7, 5)
STEPS = np.array([3, 4, 5], dtype=np.float32)


def parts_of(rank: int) -> list[Part]:
    """Rank 0 has the first rows and some of the fourth, rank 1 the rest."""
    boxes = [[Box((0, 0), (3, 5)), Box((3, 0), (1, 2))], [Box((3, 2), (1, 3)), Box((4, 0), (3, 5))]][rank]
    parts = [Part("weight", (7, 5), box, partial(WEIGHT.__getitem__, box.slices)) for box in boxes]
    return [*parts, Part("steps", (3,), Box((0,), (3,)), lambda: STEPS)] if rank else parts


def save(folder: Path) -> Path:
    store.begin(folder)
    for rank in (1, 0):
        store.write_rank(folder, rank, parts_of(rank))
    step = int(folder.name.removeprefix("step_"))
    files = {"tokenizer.model": b"pieces"}
    return store.finish(folder, ranks=2, manifest=Manifest(step, {}, {}), state={"step": step}, files=files)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "step_10")


def test_a_file_is_read_by_the_library_and_its_digest_is_right(tmp_path: Path) -> None:
    arrays = {
        "a": WEIGHT,
        "b": STEPS,
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    record = write_safetensors(tmp_path / "x", {key: a.shape for key, a in arrays.items()}, arrays.values())
    assert record == file_record(tmp_path / "x")
    with safe_open(tmp_path / "x", "numpy") as file:
        for key, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(key), array)
        np.testing.assert_array_equal(file.get_slice("a")[2:5, 1:3], WEIGHT[2:5, 1:3])


@pytest.mark.parametrize("box", [Box((0, 0), (7, 5)), Box((3, 1), (1, 3)), Box((2, 2), (3, 2)), Box((6, 4), (1, 1))])
def test_any_box_is_read(saved: Path, box: Box) -> None:
    out = np.full(box.shape, np.nan, np.float32)
    CheckpointReader(saved).read("weight", box, out)
    np.testing.assert_array_equal(out, WEIGHT[box.slices])


def test_a_checkpoint_says_what_it_holds(saved: Path) -> None:
    reader = CheckpointReader(saved)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in reader.manifest.tensors.items()} == {
        "steps": ((3,), "F32"),
        "weight": ((7, 5), "F32"),
    }
    assert reader.state == {"step": 10}
    assert reader.faults() == []
    assert sorted(path.name for path in saved.iterdir()) == [
        "manifest.json",
        "rank_00000.safetensors",
        "rank_00001.safetensors",
        "state.json",
        "tokenizer.model",
    ]
    assert list(saved.parent.glob("*.tmp")) == []


def test_the_newest_comes_first_and_half_of_one_is_none(saved: Path) -> None:
    older, half = saved.parent / "step_9", saved.parent / "step_11"
    save(older)
    store.begin(half)
    store.write_rank(half, 0, parts_of(0))
    assert checkpoints(saved.parent) == [(10, saved), (9, older)]
    store.discard(half)
    assert not (saved.parent / "step_11.tmp").exists()


def test_a_save_is_given_up_where_a_rank_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "step_10"
    store.begin(folder)
    store.write_rank(folder, 0, parts_of(0))

    def gone() -> None:
        raise RuntimeError("rank 1 is gone")

    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        store.finish(folder, ranks=2, manifest=Manifest(10, {}, {}), state={}, alive=gone)
    assert checkpoints(tmp_path) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (flip, "rank_00001.safetensors has another SHA-256 than the manifest says"),
        (Path.unlink, "rank_00001.safetensors is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "rank_00001.safetensors has "),
    ],
)
def test_damage_is_named(saved: Path, damage: Callable[[Path], object], fault: str) -> None:
    damage(saved / "rank_00001.safetensors")
    (found,) = CheckpointReader(saved).faults()
    assert found.startswith(fault)


def overlap(manifest: dict) -> None:
    """Rows 0 to 3 and 3 to 5: as many elements as there are rows, and the last row is a hole."""
    tensor = manifest["tensors"]["weight"]
    rows = [(0, 2), (2, 2), (3, 3)]
    tensor["chunks"] = [{**tensor["chunks"][0], "offset": [at, 0], "shape": [n, 5]} for at, n in rows]


def enlarge(manifest: dict) -> None:
    tensor = manifest["tensors"]["steps"]
    tensor["shape"] = tensor["chunks"][0]["shape"] = [10**30]


def edited(saved: Path, edit: Callable[[dict], None]) -> str:
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError) as raised:
        CheckpointReader(saved)
    return str(raised.value)


@pytest.mark.parametrize("name", ["../rank", "/etc/passwd", "a/b", "..", "a\\b", ""])
def test_a_name_that_leaves_the_folder_is_refused(saved: Path, name: str) -> None:
    def edit(manifest: dict) -> None:
        manifest["files"][name] = manifest["files"].pop("state.json")

    assert f"names the file {name!r}" in edited(saved, edit)


def test_an_array_of_another_shape_is_refused(saved: Path) -> None:
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    chunk = manifest["tensors"]["steps"]["chunks"][0]
    chunk.update(file="rank_00000.safetensors", key="weight@0,0")
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"it is of \(3, 5\), not \(3,\)"):
        CheckpointReader(saved).read("steps", Box((0,), (3,)), np.empty(3, np.float32))


def test_a_link_out_of_the_folder_is_refused(saved: Path) -> None:
    (saved / "state.json").unlink()
    (saved / "state.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"names the file 'state\.json'"):
        CheckpointReader(saved)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda m: m.update(version=2), "version 1 is read"),
        (lambda m: m["tensors"]["weight"]["chunks"].pop(), "the chunks of weight hold"),
        (lambda m: m["tensors"]["weight"]["chunks"][0].update(offset=[5, 0]), "outside it"),
        (lambda m: m["tensors"]["weight"]["chunks"][0].update(file="other"), "a file that is not listed"),
        (lambda m: m.pop("tensors"), "tensors: Field required"),
        (lambda m: m.pop("format"), "version 1 is read"),
        (lambda m: m["files"].pop("state.json"), "lists no state.json"),
        (lambda m: m.update(precision="int4"), "precision='int4' is none of fp32, bf16, fp16"),
        (lambda m: m.update(step=-1), "step: "),
        (lambda m: m["tensors"]["weight"].update(dtype="BF16"), "dtype: "),
        (lambda m: m["files"].update({"x" * 300: m["files"]["state.json"]}), "names the file"),
        (lambda m: m["tensors"].update({"\x1b[31m": m["tensors"]["steps"]}), "is no name of a tensor"),
        (overlap, "weight has two chunks that overlap, at (2, 0) and (3, 0)"),
        (enlarge, "more than there are in its"),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused(
    saved: Path, edit: Callable[[dict], None], problem: str
) -> None:
    assert problem in edited(saved, edit)


def test_a_model_that_is_none_is_told_in_our_words(tmp_path: Path) -> None:
    store.begin(tmp_path / "step_1")
    store.write_rank(tmp_path / "step_1", 0, [])
    model = {"architecture": "llama", "hidden_size": 0}
    folder = store.finish(tmp_path / "step_1", ranks=1, manifest=replace(Manifest(1, {}, {}), model=model), state={})
    with pytest.raises(UserError) as caught:
        CheckpointWeights(CheckpointReader(folder))
    told = "its manifest names no model that megalite knows: hidden_size=0 is not an integer of at least 1"
    assert str(caught.value) == f"{folder}: {told}"
