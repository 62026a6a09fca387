"""``megalite inspect CHECKPOINT``: what it lists, whether files are sound, how two differ."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from megalite.checkpoint import inspection, store
from megalite.checkpoint.inspection import compare, flat_state, in_model_order, list_checkpoints, norms, tiles
from megalite.checkpoint.manifest import Manifest
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.store import Part
from megalite.cli import main
from megalite.parallel.regions import Region

SHAPES = {"layers.10.mlp.up.weight": (6, 5), "layers.2.mlp.up.weight": (6, 5), "final_norm.weight": (5,)}
MODEL = {"architecture": "llama", "hidden_size": 5}
STATE = {
    "step": 20,
    "consumed_samples": 160,
    "data": {"sources": [{"prefix": "data/a", "samples": 160}]},
    "optimizer": {"loss_scale": {"cur_scale": 65536.0}},
}


def arrays(seed: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        f"{kind}/{name}": generator.standard_normal(shape).astype(np.float32)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, shape in SHAPES.items()
    }


def save(
    folder: Path, tensors: Mapping[str, np.ndarray], *, ranks: int = 1, state: Mapping[str, object] = STATE
) -> Path:
    """A checkpoint whose ranks hold the rows of every tensor in turn."""
    store.begin(folder)
    for rank in range(ranks):
        parts = []
        for name, array in tensors.items():
            rows = slice(len(array) * rank // ranks, len(array) * (rank + 1) // ranks)
            mine, offset = array[rows], (rows.start, *[0] * (array.ndim - 1))
            if len(mine):
                parts.append(Part(name, array.shape, Region(offset, mine.shape), lambda mine=mine: mine))
        store.write_rank(folder, rank, parts)
    versions = {"megalite": "0.1.0", "torch": "2.13.0"}
    layout = f"tensor {ranks} x pipeline 1 x data 1, ZeRO-1, bf16"
    manifest = Manifest(20, {}, {}, versions, layout, MODEL, "bf16", tokenizer_sha256="ab" * 32)
    return store.finish(folder, ranks=ranks, manifest=manifest, state=state)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints" / "step_20", arrays(), ranks=2)


def ignore(done: int, total: int) -> None:
    assert 0 < done <= total


def test_a_checkpoint_is_described(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in saved.iterdir()) / 1e6
    assert lines[:7] == [
        f"{saved}: step 20, 65 parameters, 9 tensors, {size:,.1f} MB",
        "layout at save: tensor 2 x pipeline 1 x data 1, ZeRO-1, bf16",
        "precision: bf16, stored in fp32",
        "versions: megalite 0.1.0, torch 2.13.0",
        "optimizer: adamw",
        "model: architecture llama, hidden_size 5",
        "tokenizer: SHA-256 abababababab",
    ]
    told = [line.split() for line in lines]
    assert ["files:", "rank_00000.safetensors", f"{(saved / 'rank_00000.safetensors').stat().st_size:,}"] in told
    assert ["consumed_samples", "160"] in told
    assert ["data.sources.0.samples", "160"] in told
    assert ["optimizer.loss_scale.cur_scale", "65536.0"] in told
    table = told[told.index(["L2", "norms", "of", "the", "tensors"]) + 1 :]
    assert table[0] == ["weight", "exp_avg", "exp_avg_sq"]
    whole = arrays()
    for row, name in zip(
        table[1:4], ("layers.2.mlp.up.weight", "layers.10.mlp.up.weight", "final_norm.weight"), strict=True
    ):
        values = [np.linalg.norm(whole[f"{kind}/{name}"].astype(np.float64)) for kind in table[0]]
        shape = " x ".join(map(str, SHAPES[name])).split()
        assert row == [name, *shape, *(f"{value:.6g}" for value in values)]
    total = [
        np.sqrt(sum((whole[n].astype(float) ** 2).sum() for n in whole if n.startswith(f"{k}/"))) for k in table[0]
    ]
    assert table[4] == ["all", *(f"{value:.6g}" for value in total)]


@pytest.mark.parametrize("most", [1, 4, 7, 1000])
@pytest.mark.parametrize("shape", [(), (7,), (5, 4), (2, 3, 5)])
def test_tiles_cover_a_tensor_once(shape: tuple[int, ...], most: int) -> None:
    seen = np.zeros(shape, int)
    for region in tiles(shape, most):
        assert region.numel <= most
        seen[region.slices] += 1
    assert (seen == 1).all()


def test_norms_are_taken_box_by_box(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(norms(CheckpointReader(saved), ignore))
    regions: list[int] = []
    read = CheckpointReader.read
    monkeypatch.setattr(
        CheckpointReader, "read", lambda s, n, region, out: regions.append(region.numel) or read(s, n, region, out)
    )
    monkeypatch.setattr(inspection, "REGION_ELEMENTS", 4)
    found = list(norms(CheckpointReader(saved), ignore))
    assert max(regions) <= 4
    assert sum(regions) == 3 * 65
    for tensor, other in zip(found, expected, strict=True):
        assert tensor.norms == pytest.approx(other.norms, rel=1e-12)


def test_tensors_stand_in_the_order_of_the_model() -> None:
    names = ["weight/head.weight", "weight/final_norm.bias", "weight/layers.10.x", "weight/layers.9.x"]
    assert in_model_order({*names, "exp_avg/embedding.y", "weight/embedding.y", "other/z"}) == [
        *("weight/embedding.y", "weight/layers.9.x", "weight/layers.10.x", "weight/final_norm.bias"),
        *("weight/head.weight", "exp_avg/embedding.y", "other/z"),
    ]


def test_state_is_told_line_by_line() -> None:
    assert flat_state({"a": {"b": [1, 2], "c": None}, "d": [{"e": "x"}]}) == {
        "a.b": "[1, 2]",
        "a.c": "None",
        "d.0.e": "x",
    }


def test_a_run_lists_its_checkpoints(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = saved.parent
    save(root / "step_3", arrays(), ranks=1)
    shutil.copytree(saved, root / "step_30")
    (root / "step_30" / "rank_00001.safetensors").unlink()
    with (root / "step_30" / "rank_00000.safetensors").open("ab") as file:
        size = file.tell()
        file.write(b"more")
    shutil.copytree(saved, root / "step_40")
    (root / "step_40" / "manifest.json").write_text("{}")
    store.begin(root / "step_50")
    (tmp_path / "config.yaml").write_text("run: {}\n")
    for path in (root, tmp_path):
        assert main(["inspect", str(path)]) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        assert head == f"{root}: 2 checkpoints"
        assert [row.split()[0] for row in rows] == ["step_3", "step_20", "step_30", "step_40", "step_50.tmp"]
        assert rows[0].endswith(" MB")
        assert rows[1].endswith(" MB  newest")
        fault = f"rank_00000.safetensors has {size + 4:,} bytes, not {size:,}; rank_00001.safetensors is missing"
        assert rows[2].endswith(f"broken: {fault}")
        assert "broken: " in rows[3]
        assert "  unfinished: " in rows[4]
    assert [one.bytes for one in list_checkpoints(root)][1] == sum(path.stat().st_size for path in saved.iterdir())


def test_digests_are_checked(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved), "--verify"]) == 0
    assert capsys.readouterr().out.startswith(f"{saved}: all 3 files, 0.0 MB, are as they were written")
    size = (saved / "state.json").stat().st_size
    flipped = bytearray((saved / "rank_00000.safetensors").read_bytes())
    flipped[-1] ^= 1
    (saved / "rank_00000.safetensors").write_bytes(flipped)
    (saved / "rank_00001.safetensors").unlink()
    (saved / "state.json").write_text("{}")
    assert main(["inspect", str(saved), "--verify"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sorted(captured.err.splitlines()) == sorted(
        f"megalite: error: {saved}: {fault}; use another checkpoint"
        for fault in (
            "rank_00000.safetensors has another SHA-256 than the manifest says",
            "rank_00001.safetensors is missing",
            f"state.json has 2 bytes, not {size}",
        )
    )


def test_other_layouts_of_the_same_are_equal(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save(tmp_path / "step_20", arrays(), ranks=3)
    assert main(["inspect", str(saved), "--diff", str(other)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"{kind}: 3 tensors are equal bit by bit, 0 are not" for kind in ("weight", "exp_avg", "exp_avg_sq")),
        "equal",
    ]


@pytest.mark.parametrize("most", [4, 1000])
def test_the_first_difference_is_named_and_measured(
    saved: Path, tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspection, "REGION_ELEMENTS", most)
    changed = arrays()
    first, later = changed["weight/layers.10.mlp.up.weight"], changed["exp_avg/final_norm.weight"]
    first[4, 3] += 0.5
    first[1, 2] -= 0.25
    later *= 3
    other = save(tmp_path / "step_20", changed)
    assert main(["inspect", str(saved), "--diff", str(other)]) == 1
    lines = capsys.readouterr().out.splitlines()
    before = arrays()["weight/layers.10.mlp.up.weight"]
    relative = np.linalg.norm(first.astype(float) - before) / np.linalg.norm(before.astype(float))
    assert lines == [
        "weight: 2 tensors are equal bit by bit, 1 are not",
        "exp_avg: 2 tensors are equal bit by bit, 1 are not",
        "exp_avg_sq: 3 tensors are equal bit by bit, 0 are not",
        "the first that differs: weight/layers.10.mlp.up.weight: by 0.5 at most, at [4, 3], "
        f"{before[4, 3]:.9g} in A and {first[4, 3]:.9g} in B; 2 of 30 elements differ, by {relative:.3g} of A's norm",
        lines[4],
    ]
    assert lines[4].startswith("the one that differs most: exp_avg/final_norm.weight: by ")
    assert lines[4].endswith("; 5 of 5 elements differ, by 2 of A's norm")


@pytest.mark.parametrize(("value", "largest"), [(np.nan, np.inf), (np.inf, np.inf), (-0.0, 0.0)])
def test_what_equals_in_no_bit_or_no_value(saved: Path, tmp_path: Path, value: float, largest: float) -> None:
    """A NaN is as far away as can be, and -0.0 is not 0.0; a NaN in both is equal."""
    one, two = arrays(), arrays()
    for changed in (one, two):
        changed["exp_avg/final_norm.weight"][1] = np.nan
        changed["weight/final_norm.weight"][2] = 0.0
    two["weight/final_norm.weight"][2] = value
    a, b = (save(tmp_path / name / "step_20", held) for name, held in (("a", one), ("b", two)))
    found = compare(CheckpointReader(a), CheckpointReader(b), ignore)
    assert found.counts == {"weight": (2, 1), "exp_avg": (3, 0), "exp_avg_sq": (3, 0)}
    assert found.first is not None
    assert (found.first.name, found.first.index) == ("weight/final_norm.weight", (2,))
    assert (found.first.largest, found.first.differing) == (largest, 1)
    assert not found.equal


def test_names_shapes_and_state_that_differ_are_listed(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = arrays()
    del changed["exp_avg/final_norm.weight"]
    changed["weight/final_norm.weight"] = np.ones(7, np.float32)
    changed["momentum/final_norm.weight"] = np.ones(5, np.float32)
    state = STATE | {"consumed_samples": 168, "seed": 3}
    other = save(tmp_path / "step_20", changed, state=state)
    assert main(["inspect", str(saved), "--diff", str(other)]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["weight/final_norm.weight", "5", "7"] in rows
    assert ["exp_avg/final_norm.weight", "5", "missing"] in rows
    assert ["momentum/final_norm.weight", "missing", "5"] in rows
    assert ["consumed_samples", "160", "168"] in rows
    assert ["seed", "missing", "3"] in rows
    assert not any("the first that differs" in " ".join(row) for row in rows)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--step", "3"], "--step: {} is a checkpoint, of which it says nothing; leave it out"),
        (["--documents", "3"], "--documents: {} is a checkpoint, of which it says nothing; leave it out"),
        (["--verify", "--diff", "b"], "--verify: stands beside --diff; ask for one after the other"),
        (["--diff", "nowhere"], "nowhere: is not a checkpoint: it has no manifest.json; give a folder step_N"),
    ],
)
def test_what_a_checkpoint_does_not_know_is_refused(
    saved: Path, words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(saved), *words]) == 2
    assert capsys.readouterr().err == f"megalite: error: {problem.format(saved)}\n"


@pytest.mark.parametrize("options", [["--plot", "a.png"], ["--rank", "1"], ["--tokenizer", "t", "--verify"]])
def test_what_no_checkpoint_knows_is_refused_of_many(
    saved: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(saved.parent), *options]) == 2
    assert f"{options[0]}: {saved.parent} is a folder of checkpoints" in capsys.readouterr().err


def test_of_a_folder_or_a_run_the_newest_whole_checkpoint_is_verified(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = save(saved.with_name("step_100"), arrays())
    (saved.with_name("step_300")).mkdir()  # without a manifest
    (saved.with_name("step_200.tmp")).mkdir()
    run = saved.parent.parent
    (run / "config.yaml").touch()
    for folder in (saved.parent, run):
        assert main(["inspect", str(folder), "--verify"]) == 0
        told, sound = capsys.readouterr().out.splitlines()
        assert told == f"{folder}: the newest is {newest}"
        assert sound.startswith(f"{newest}: all ")
    flip = bytearray((newest / "rank_00000.safetensors").read_bytes())
    flip[-1] ^= 1
    (newest / "rank_00000.safetensors").write_bytes(flip)
    assert main(["inspect", str(run), "--verify"]) == 2
    assert f"megalite: error: {newest}: " in capsys.readouterr().err


def test_the_newest_of_two_folders_are_compared(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = save(saved.with_name("step_30"), arrays())
    other = save(tmp_path / "other" / "checkpoints" / "step_30", arrays(seed=2))
    assert main(["inspect", str(saved.parent), "--diff", str(tmp_path / "other")]) == 1
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{saved.parent}: the newest is {newest}",
        f"{tmp_path / 'other'}: the newest is {other}",
    ]
    assert main(["inspect", str(saved), "--diff", str(saved.parent)]) == 0


def test_where_no_save_has_ended_nothing_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints" / "step_5.tmp").mkdir(parents=True)
    assert main(["inspect", str(tmp_path), "--verify"]) == 2
    message = f"{tmp_path / 'checkpoints'}: holds no checkpoint that is whole; give another folder"
    assert capsys.readouterr().err == f"megalite: error: {message}\n"


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("[]")])
def test_a_broken_manifest_is_named(
    saved: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(saved / "manifest.json")
    assert main(["inspect", str(saved)]) == 2
    assert str(saved) in capsys.readouterr().err
