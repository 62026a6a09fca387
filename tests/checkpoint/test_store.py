"""What many ranks write is one checkpoint, there whole or not at all, and read in any other cut."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from megalite.checkpoint import store
from megalite.checkpoint.discovery import find_checkpoints
from megalite.checkpoint.manifest import Manifest
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.retention import clean, prune, set_aside_later
from megalite.checkpoint.safetensors_file import file_record, write_safetensors
from megalite.checkpoint.store import Part
from megalite.checkpoint.weights import CheckpointWeights
from megalite.errors import UserError
from megalite.parallel.regions import Region

pytestmark = pytest.mark.slow

WEIGHT = np.arange(35, dtype=np.float32).reshape(7, 5)
STEPS = np.array([3, 4, 5], dtype=np.float32)


def parts_of(rank: int) -> list[Part]:
    """Rank 0 has the first rows and some of the fourth, rank 1 the rest."""
    regions = [[Region((0, 0), (3, 5)), Region((3, 0), (1, 2))], [Region((3, 2), (1, 3)), Region((4, 0), (3, 5))]][rank]
    parts = [Part("weight", (7, 5), region, partial(WEIGHT.__getitem__, region.slices)) for region in regions]
    return [*parts, Part("steps", (3,), Region((0,), (3,)), lambda: STEPS)] if rank else parts


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


@pytest.mark.parametrize(
    "region", [Region((0, 0), (7, 5)), Region((3, 1), (1, 3)), Region((2, 2), (3, 2)), Region((6, 4), (1, 1))]
)
def test_any_region_is_read(saved: Path, region: Region) -> None:
    out = np.full(region.shape, np.nan, np.float32)
    CheckpointReader(saved).read("weight", region, out)
    np.testing.assert_array_equal(out, WEIGHT[region.slices])


def test_a_checkpoint_says_what_it_holds(saved: Path) -> None:
    reader = CheckpointReader(saved)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in reader.manifest.tensors.items()} == {
        "steps": ((3,), "F32"),
        "weight": ((7, 5), "F32"),
    }
    assert reader.state == {"step": 10}
    assert reader.problems() == []
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
    assert find_checkpoints(saved.parent) == [(10, saved), (9, older)]
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
    assert find_checkpoints(tmp_path) == []


class Killed(Exception):
    """Ends a save where a kill would."""


def save_again(folder: Path, killed_at: str | None) -> list[str]:
    """Save a step that was saved before, with another state, and die at a point; return the points passed."""
    passed: list[str] = []

    def on_save_point(point: str) -> None:
        passed.append(point)
        if point == killed_at:
            raise Killed

    store.begin(folder)
    for rank in (1, 0):
        store.write_rank(folder, rank, parts_of(rank))
    manifest = Manifest(int(folder.name.removeprefix("step_")), {}, {})
    with suppress(Killed):
        store.finish(folder, ranks=2, manifest=manifest, state={"saved": "again"}, on_save_point=on_save_point)
    return passed


POINTS = ["recorded", "described", "set aside", "named"]


@pytest.mark.parametrize("point", [*POINTS, None])
def test_a_checkpoint_is_replaced_by_one_of_its_step_or_stays(saved: Path, point: str | None) -> None:
    older = save(saved.parent / "step_9")
    passed = save_again(saved, point)
    assert passed == (POINTS[: POINTS.index(point) + 1] if point else POINTS)
    for _ in range(2):  # as the kill left it, and after the next start has cleaned up
        (step, newest), other = find_checkpoints(saved.parent)
        assert (step, other) == (10, (9, older))
        reader = CheckpointReader(newest)
        assert reader.problems() == []
        assert reader.state == ({"saved": "again"} if point in ("named", None) else {"step": 10})
        clean(saved.parent)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["step_10", "step_9"]
    save_again(saved, None)
    assert CheckpointReader(saved).state == {"saved": "again"}


@pytest.mark.parametrize("left", ["file", "dangling link", "link to a folder", "folder"])
def test_what_lies_in_the_way_of_a_save_is_removed(saved: Path, left: str) -> None:
    growing, kept = saved.parent / "step_11.tmp", saved.parent / "kept"
    kept.mkdir()
    (kept / "file").write_text("stays")
    if left == "file":
        growing.write_text("")
    elif left == "folder":
        (growing / "deep").mkdir(parents=True)
    else:
        growing.symlink_to(kept if left == "link to a folder" else "nowhere")
    assert CheckpointReader(save(saved.parent / "step_11")).problems() == []
    assert (kept / "file").read_text() == "stays"


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the system refuse to remove files of some names, and to rename folders of some names: a file that NFS holds
    for another process, a mount, a folder of another user."""

    def refuse(*, remove: Sequence[str] = (), rename: Sequence[str] = ()) -> None:
        plain = {"unlink": Path.unlink, "rename": Path.rename}

        def unlink(path: Path, missing_ok: bool = False) -> None:
            if path.name in remove:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
            plain["unlink"](path, missing_ok=missing_ok)

        def move(path: Path, target: Path) -> Path:
            if path.name in rename:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return plain["rename"](path, target)

        monkeypatch.setattr(Path, "unlink", unlink)
        monkeypatch.setattr(Path, "rename", move)

    return refuse


def test_an_old_one_that_cannot_be_removed_fails_no_save(saved: Path, busy: Callable[..., None]) -> None:
    (saved / ".nfs0").write_text("in use")
    busy(remove=[".nfs0"])
    for number in (1, 2, 3):  # what is left of one is in the way of the next
        save_again(saved, None)
        assert find_checkpoints(saved.parent) == [(10, saved)]
        assert CheckpointReader(saved).state == {"saved": "again"}
        assert CheckpointReader(saved).problems() == []
        assert len(clean(saved.parent)) == number
        (saved / ".nfs0").write_text(f"in use for the time {number}")


def test_a_save_passes_by_what_cannot_be_removed(saved: Path, busy: Callable[..., None]) -> None:
    left = saved.parent / "step_11.tmp"
    left.mkdir()
    (left / ".nfs0").write_text("in use")
    (left / "large").write_text("goes")
    busy(remove=[".nfs0"])
    folder = save(saved.parent / "step_11")
    assert CheckpointReader(folder).problems() == []
    assert [path.name for path in (saved.parent / "step_11.1.tmp").iterdir()] == [".nfs0"]
    (warning,) = clean(saved.parent)
    assert "step_11.1.tmp: cannot be removed and stays: " in warning
    assert ".nfs0: Device or resource busy" in warning


def test_pruning_goes_on_past_what_cannot_be_removed(saved: Path, busy: Callable[..., None]) -> None:
    root = saved.parent
    archive = root / "archive"
    for step in (1, 2, 3, 4):
        save(root / f"step_{step}")
    (root / "step_1").rename(archive)
    (root / "step_1").symlink_to(archive)
    (root / "step_3/.nfs0").write_text("in use")
    busy(remove=[".nfs0"], rename=["step_2"])
    told: dict[str, str] = {}
    gone = prune(root, 1, None, lambda folder, what: told.update({folder.name: what}))
    assert [folder.name for folder in gone] == ["step_1", "step_3", "step_4"]
    assert told["step_1"] == f"it is a link: the link is removed, and {archive} stays"
    assert told["step_2"] == f"it cannot be removed and stays: {root}/step_2: Permission denied"
    rest = root / "step_3.tmp"
    assert told["step_3"] == (
        f"a part of it cannot be removed and stays in {rest}: {rest}/.nfs0: Device or resource busy"
    )
    assert CheckpointReader(archive).problems() == []
    assert [step for step, _ in find_checkpoints(root)] == [10, 2]
    assert [path.name for path in (root / "step_3.tmp").iterdir()] == [".nfs0"]
    assert "step_4" not in told


@pytest.mark.parametrize("left", ["a file", "a link to a folder", "a dangling link", "a folder", "a folder with links"])
def test_a_start_removes_whatever_bears_the_name_of_a_save(saved: Path, left: str) -> None:
    growing, kept_folder = saved.parent / "step_3.tmp", saved.parent / "kept"
    kept_folder.mkdir()
    (kept_folder / "file").write_text("stays")
    if left == "a file":
        growing.write_text("")
    elif left.startswith("a folder"):
        growing.mkdir()
        (growing / "inner").symlink_to(kept_folder)
        (growing / "dangling").symlink_to("nowhere")
    else:
        growing.symlink_to("nowhere" if left == "a dangling link" else kept_folder)
    assert clean(saved.parent) == []
    assert sorted(path.name for path in saved.parent.iterdir()) == ["kept", saved.name]
    assert (kept_folder / "file").read_text() == "stays"


def test_later_ones_are_set_aside_beside_where_checkpoints_lie_on_another_disk(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = tmp_path / "earlier/4/checkpoints"
    plain = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if target.is_relative_to(tmp_path / "earlier"):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))
        return plain(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert set_aside_later(saved.parent, 9, aside) == (["step_10"], saved.parent / "earlier_4")
    assert find_checkpoints(saved.parent) == []
    assert CheckpointReader(saved.parent / "earlier_4/step_10").problems() == []


def test_a_later_one_that_cannot_be_set_aside_is_an_error(saved: Path, busy: Callable[..., None]) -> None:
    busy(rename=["step_10"])
    with pytest.raises(UserError, match=r"step_10: is of a later step than 9, .* Permission denied; move it away"):
        set_aside_later(saved.parent, 9, saved.parent / "earlier/1/checkpoints")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (flip, "rank_00001.safetensors has another SHA-256"),
        (Path.unlink, "rank_00001.safetensors is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "rank_00001.safetensors has "),
    ],
)
def test_damage_is_named(saved: Path, damage: Callable[[Path], object], fault: str) -> None:
    damage(saved / "rank_00001.safetensors")
    (found,) = CheckpointReader(saved).problems()
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
    with pytest.raises(UserError, match=r"its shape is \(3, 5\), not \(3,\)"):
        CheckpointReader(saved).read("steps", Region((0,), (3,)), np.empty(3, np.float32))


def test_a_link_out_of_the_folder_is_refused(saved: Path) -> None:
    (saved / "state.json").unlink()
    (saved / "state.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"names the file 'state\.json'"):
        CheckpointReader(saved)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda m: m.update(version=2), "version 2; "),
        (lambda m: m["tensors"]["weight"]["chunks"].pop(), "the chunks of weight cover"),
        (lambda m: m["tensors"]["weight"]["chunks"][0].update(offset=[5, 0]), "weight of shape"),
        (lambda m: m["tensors"]["weight"]["chunks"][0].update(file="other"), "weight is in 'other'"),
        (lambda m: m.pop("tensors"), "tensors: Field required"),
        (lambda m: m.pop("format"), "format None, "),
        (lambda m: m["files"].pop("state.json"), "lists no state.json"),
        (lambda m: m.update(precision="int4"), "precision='int4' is none of fp32, bf16, fp16"),
        (lambda m: m.update(step=-1), "step: "),
        (lambda m: m["tensors"]["weight"].update(dtype="BF16"), "dtype: "),
        (lambda m: m["files"].update({"x" * 300: m["files"]["state.json"]}), "names the file"),
        (lambda m: m["tensors"].update({"\x1b[31m": m["tensors"]["steps"]}), r"'\x1b[31m' is not a tensor's name"),
        (overlap, "weight has two chunks that overlap, at (2, 0) and (3, 0)"),
        (enlarge, " elements, more than "),
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
    assert str(caught.value).startswith(f"{folder}: ")
    assert "hidden_size=0 is not an integer of at least 1" in str(caught.value)
