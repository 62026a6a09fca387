"""A dry run makes the checks of a start, says what it could not look at, and needs neither data nor ranks."""

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from harness import run_distributed
from resuming import run_on_rank
from training import QUICKSTART_MODEL

from megalite.cli import main
from megalite.data.indexed.writer import IndexedDatasetWriter
from megalite.errors import UserError

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def write_corpus(prefix: Path, documents: int = 40, seed: int = 1) -> None:
    generator = np.random.default_rng(seed)
    writer = IndexedDatasetWriter(prefix, np.dtype(np.uint16))
    for _ in range(documents):
        writer.add_document(generator.integers(0, 300, int(generator.integers(20, 200))).astype(np.uint16))
    writer.finalize()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a run file, and the run of it, which trained four steps and saved two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder / "corpus")
    content: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "seed": 5},
        "model": QUICKSTART_MODEL
        | {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 300},
        "data": {"sequence_length": 32, "train": [{"prefix": str(folder / "corpus")}]},
        "train": {"steps": 8, "stop_after": 4, "global_batch_size": 4, "micro_batch_size": 2},
        "checkpoint": {"every": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    run_distributed(run_on_rank, 1, str(folder / "run.yaml"), [])
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained folder, to be spoilt."""
    shutil.copytree(trained / "run", tmp_path / "run")
    for path in trained.glob("corpus.*"):
        shutil.copy(path, tmp_path)
    text = (trained / "run.yaml").read_text().replace(str(trained), str(tmp_path))
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path


def dry_run(folder: Path, capsys: Capture, *overrides: str) -> tuple[int, str, str]:
    """The status, and what a dry run of a folder's run file printed and complained of; it changes no file."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status = main(["train", str(folder / "run.yaml"), "--dry-run", *overrides])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    told = capsys.readouterr()
    first, err = told.err.split("\n", 1)
    assert first == "megalite: checking run.yaml"
    return status, told.out, err


def checkpoint(folder: Path, step: int = 4) -> Path:
    return folder / "run" / "checkpoints" / f"step_{step}"


def edit_state(folder: Path, **changes: Any) -> None:
    """Change a checkpoint's state, and the size and digest that its manifest has of it."""
    from megalite.checkpoint.safetensors_file import file_record

    path, manifest = checkpoint(folder) / "state.json", checkpoint(folder) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    document, record = json.loads(manifest.read_text()), file_record(path)
    if "state.json" in document["files"]:
        document["files"]["state.json"] = {"bytes": record.bytes, "sha256": record.sha256}
        manifest.write_text(json.dumps(document))


def cut(folder: Path, step: int) -> None:
    path = next(checkpoint(folder, step).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])


def flip(folder: Path) -> None:
    path = next(checkpoint(folder).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def both_cut(folder: Path) -> None:
    cut(folder, 2)
    cut(folder, 4)


def passed_over(folder: Path) -> None:
    edit_state(folder, passed_over=[{"after": 2, "samples": 8}])


def nothing(folder: Path) -> None:
    """Leave all as it is."""


REFUSED: list[tuple[str, Callable[[Path], None], list[str], list[str]]] = [
    (
        "global batch",
        nothing,
        ["train.global_batch_size=8", "data.order=megatron"],
        ["sample 16 after step 4", "at 32", "keep train.global_batch_size"],
    ),
    ("other model", nothing, ["model.num_hidden_layers=2"], ["step_4: ", "num_hidden_layers", "resume=never"]),
    ("named, cut", lambda folder: cut(folder, 4), ["resume=RUN/checkpoints/step_4"], ["bytes, not", "is damaged"]),
    ("named, one bit", flip, ["resume=RUN/checkpoints/step_4"], ["another SHA-256", "is damaged"]),
    ("none whole", both_cut, [], ["no checkpoint is whole; write resume=never"]),
    ("no such checkpoint", nothing, ["resume=RUN/checkpoints/step_3"], ["step_3: is not a checkpoint"]),
    (
        "passed over",
        passed_over,
        ["data.order=megatron"],
        ["8 samples", "data.order='megatron' has no further", "streaming"],
    ),
    ("weights of another size", nothing, ["init_from=RUN", "resume=never", "model.hidden_size=64"], ["another model"]),
    ("no weights", nothing, ["init_from=RUN/nowhere", "resume=never"], ["there is no such folder"]),
    ("damaged weights", flip, ["init_from=RUN/checkpoints/step_4", "resume=never"], ["another SHA-256", "is damaged"]),
    ("half a dataset", lambda folder: (folder / "corpus.bin").unlink(), [], ["corpus.bin", "no such file"]),
    ("vocabulary", nothing, ["resume=never", "model.vocab_size=200"], ["token id", "200"]),
    ("precision", nothing, ["deepspeed.bf16.enabled=true", "train.precision=fp32"], ["train.precision='fp32'"]),
]


@pytest.mark.parametrize(("spoil", "overrides", "parts"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_a_start_would_refuse_a_dry_run_refuses(
    spoil: Callable[[Path], object], overrides: list[str], parts: list[str], here: Path, capsys: Capture
) -> None:
    spoil(here)
    status, out, err = dry_run(here, capsys, *(text.replace("RUN", str(here / "run")) for text in overrides))
    assert (status, out) == (2, "")
    assert err.startswith("megalite: error: ")
    for part in parts:
        assert part in err


def other_corpus(folder: Path) -> None:
    write_corpus(folder / "corpus", seed=2)


WARNED: list[tuple[str, Callable[[Path], None], list[str], str]] = [
    ("as it was", nothing, [], ""),
    ("newest cut", lambda folder: cut(folder, 4), [], "warning: skipped RUN/checkpoints/step_4: "),
    ("seed", nothing, ["run.seed=6"], "warning: the data, their order or the seed differ from the checkpoint's"),
    ("text", other_corpus, [], "warning: the data, their order or the seed differ from the checkpoint's"),
    ("order", nothing, ["data.order=megatron"], "warning: the data, their order or the seed differ from the check"),
    ("past the end", nothing, ["train.stop_after=3"], "warning: the checkpoint is past the last step"),
    ("done", nothing, [], "nothing is left to train: step 4 is done"),
    ("to go on", nothing, ["train.stop_after=null"], ""),
    ("rope", nothing, ["init_from=RUN", "resume=never", "model.rope_theta=5e5"], "warning: model.rope_theta=500000.0"),
    ("again", nothing, ["train.steps=300", "train.stop_after=null"], "warning: HERE/corpus is read "),
    ("half", nothing, ["deepspeed.zero_optimization.stage=0", "train.precision=bf16"], "run.yaml: deepspeed.zero_opt"),
]


@pytest.mark.parametrize(("spoil", "overrides", "start"), [case[1:] for case in WARNED], ids=[c[0] for c in WARNED])
def test_what_a_start_would_say_a_dry_run_says(
    spoil: Callable[[Path], object], overrides: list[str], start: str, here: Path, capsys: Capture
) -> None:
    spoil(here)
    status, out, err = dry_run(here, capsys, *(text.replace("RUN", str(here / "run")) for text in overrides))
    assert (status, err) == (0, "")
    told = [line for line in out.splitlines() if line.startswith(("warning", "command line", "run.yaml: deepspeed"))]
    told += [line for line in out.splitlines() if line.startswith("nothing is left")]
    start = start.replace("RUN", str(here / "run")).replace("HERE", str(here))
    if start.startswith("run.yaml"):
        start = start.replace("run.yaml", "command line")
    assert [line for line in told if line.startswith(start)] if start else not [x for x in told if "warning" in x]


def test_a_run_that_trains_is_told(here: Path, capsys: Capture) -> None:
    with (here / "run" / ".lock").open("a+") as lock:
        lock.write("process 1 on node\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, err = dry_run(here, capsys)
    assert status == 2
    assert "is in use by" in err
    assert dry_run(here, capsys)[0] == 0


def test_a_large_checkpoint_is_not_read(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.planning.preview.DIGESTED_BYTES", 100)
    flip(here)
    status, out, _ = dry_run(here, capsys)
    assert status == 0
    assert "step 4, if it is whole: its files have the right sizes, their digests are compared at the start" in out
    cut(here, 4)
    assert "warning: skipped" in dry_run(here, capsys)[1]


ABSENT: list[tuple[list[str], list[str], list[str]]] = [
    (["data.train=[{prefix: no/where}]"], ["not checked: no/where: neither no/where.idx nor no/where.bin"], ["data: "]),
    (
        ["data.valid=[{prefix: no/valid}]", "train.eval_every=2"],
        ["not checked: no/valid", "data: CORPUS"],
        ["validation"],
    ),
    (
        ["data.train=[{prefix: CORPUS}, {prefix: no/where}]", "data.valid=[{prefix: no/valid}]", "train.eval_every=2"],
        ["not checked: no/where", "not checked: no/valid"],
        ["data: "],
    ),
    (["data.tokenizer=no/tok.model"], ["not checked: data.tokenizer=no/tok.model", "data: CORPUS"], []),
    (["data.tokenizer=no/tok.model", "data.fim_rate=0.5"], ["not checked: data.tokenizer=no/tok.model"], []),
]


@pytest.mark.parametrize(("overrides", "there", "not_there"), ABSENT)
def test_what_is_absent_is_told_and_the_rest_is_checked(
    overrides: list[str], there: list[str], not_there: list[str], here: Path, capsys: Capture
) -> None:
    given = [text.replace("CORPUS", str(here / "corpus")) for text in overrides]
    status, out, err = dry_run(here, capsys, "resume=never", *given)
    assert (status, err) == (0, "")
    for part in there:
        assert part.replace("CORPUS", str(here / "corpus")) in out
    for part in not_there:
        assert part not in out
    assert "parameters in the model" in out
    assert main(["train", str(here / "run.yaml"), "resume=never", *given]) == 2, "a start needs them"
    # What there is of the data is checked all the same.
    assert dry_run(here, capsys, "resume=never", *given, "run.dir=/dev/null/run")[0] == 2
    if any("CORPUS" in text for text in there):
        assert dry_run(here, capsys, "resume=never", *given, "model.vocab_size=200")[0] == 2


@pytest.mark.parametrize(
    ("override", "size"),
    [("train.global_batch_size=8", 8), ("train.batch_size_rampup={start: 2, increment: 2, samples: 80}", 2)],
)
def test_batches_of_another_size_are_told(override: str, size: int, here: Path, capsys: Capture) -> None:
    status, out, _ = dry_run(here, capsys, override, "train.steps=10")
    assert status == 0
    assert f"batches of another size: {size} sequences" in out
    assert "batches of another size" not in dry_run(here, capsys, "train.steps=10")[1]


def test_without_data_the_order_of_a_checkpoint_is_not_compared(here: Path, capsys: Capture) -> None:
    status, out, _ = dry_run(here, capsys, "data.train=[{prefix: no/where}]")
    assert status == 0
    assert "not checked: whether the data and their order are those of the checkpoint" in out
    assert dry_run(here, capsys, "data.train=[{prefix: no/where}]", "model.num_hidden_layers=2")[0] == 2


def test_a_model_of_unknown_size_is_told(here: Path, capsys: Capture) -> None:
    status, _, err = dry_run(here, capsys, "data.tokenizer=no/tok.model", "model.vocab_size=null")
    assert status == 2
    assert "give model.vocab_size=N" in err


LAST_WORDS = """
import sys
from megalite.cli import main
status = main(sys.argv[1:])
sys.exit(9 if "torch" in sys.modules else status)
"""
WRONG: list[list[str]] = [["trian.steps=3"], ["parallel.tensor=3"], ["data.train=c"], ["init_from=me/model"]]


@pytest.mark.parametrize("given", [["--dry-run"], []], ids=["dry run", "start"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_run_file_is_told_before_torch_is_imported(given: list[str], wrong: list[str], here: Path) -> None:
    command = [sys.executable, "-c", LAST_WORDS, "train", str(here / "run.yaml"), "resume=never", *given, *wrong]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    first, told, *_ = done.stderr.splitlines()
    assert first == "megalite: checking run.yaml"
    assert told.startswith("megalite: error: ")


def test_a_name_on_a_hub_is_told_with_its_download(here: Path, capsys: Capture) -> None:
    for key in ("data.tokenizer", "init_from"):
        assert main(["train", str(here / "run.yaml"), "resume=never", f"{key}=me/model-7b"]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(f"megalite: error: {key}=me/model-7b: ")
        assert "`hf download me/model-7b --local-dir models/model-7b`" in told
    out = dry_run(here, capsys, "resume=never", "data.tokenizer=me/model-7b")[1]
    assert "not checked: data.tokenizer=me/model-7b: it is not there; " in out
    assert "hf download" in out
    status, _, err = dry_run(here, capsys, "data.tokenizer=me/model-7b", "model.vocab_size=null")
    assert status == 2
    assert "hf download" in err
    assert "model.vocab_size=N" in err


def test_under_a_launcher_rank_0_does_it(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from megalite.cli import train
    from megalite.launch import launch_environment

    monkeypatch.setattr(train, "die_with_parent", lambda: None)
    monkeypatch.setattr(train.faulthandler, "enable", lambda: None)
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    monkeypatch.setattr(train.os, "environ", dict(train.os.environ))

    def be_rank(rank: int, *overrides: str) -> str:
        environment = launch_environment(place | {"RANK": str(rank)})
        assert environment is not None
        train._be_a_rank(here / "run.yaml", list(overrides), True, environment)
        return capsys.readouterr().out

    assert be_rank(1, "model.num_hidden_layers=2") == ""
    assert "tensor 1 x pipeline 1 x data 2" in be_rank(0)
    with pytest.raises(UserError, match="model.num_hidden_layers"):
        be_rank(0, "model.num_hidden_layers=2")


def test_the_plan_of_70b_needs_no_data_and_few_lines(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        "megalite.planning.description.simulate",
        lambda streams: type("Timeline", (), {"bubble_fraction": 0.0, "peak_microbatches": [0.0]})(),
    )
    assert main(["train", "configs/llama_70b.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 25
    assert "68,976,648,192 parameters in the model" in out
    assert "not checked: data/corpus: neither data/corpus.idx nor data/corpus.bin is there" in out
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit() and "layers" in line]
    assert sum(1 + int(last or first) - int(first) for first, _, last in (row[0].partition("-") for row in rows)) == 64
    assert "without activations" in out


def test_checkpoints_of_before_warn_as_before(here: Path, capsys: Capture) -> None:
    """Their digest was over the settings alone, paths among them."""
    from megalite.config import load_run_config
    from megalite.data.order.digest import order_digest_of_before

    before = order_digest_of_before(load_run_config(here / "run.yaml"))
    edit_state(here, data={"order_sha256": before})
    assert "warning" not in dry_run(here, capsys)[1]
    assert "warning: the data" in dry_run(here, capsys, "run.seed=6")[1]


def test_more_steps_in_megatrons_order_are_told_where_they_change_it(here: Path, capsys: Capture) -> None:
    """A resumed run of more epochs reads another permutation from its next sample on."""
    edit_state(here, data={"order_sha256": digest(here, "data.order=megatron", "train.steps=8")})
    given = ["data.order=megatron", "data.max_epochs=99"]
    assert "warning" not in dry_run(here, capsys, *given)[1]
    assert "warning" not in dry_run(here, capsys, *given, "train.steps=9")[1]
    assert "warning: the data, their order" in dry_run(here, capsys, *given, "train.steps=90")[1]


def test_a_moved_corpus_and_a_higher_threshold_are_no_other_data(here: Path, capsys: Capture) -> None:
    for suffix in (".bin", ".idx"):
        shutil.move(here / f"corpus{suffix}", here / f"moved{suffix}")
    out = dry_run(here, capsys, f"data.train=[{{prefix: {here}/moved}}]", "data.max_epochs=9")[1]
    assert "warning" not in out


def digest(folder: Path, *overrides: str) -> str:
    from megalite.planning.plan import prepare

    return prepare(folder / "run.yaml", overrides, None).order_digest
