"""The fault table: after each fault the same command goes on, and ends bit-equal to the run that nothing disturbed.

Ranks that are killed in a step stand in test_survival, and in a save in test_damaged_checkpoints;
nodes and jobs in tests/slurm.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from commands import DEADLINE, ON_CPU, TINY, losses, megalite, rank, wait_for_steps
from harness import RankError, run_distributed
from resuming import KEPT, PAIR, SMALL, assert_same_run, run
from training import after_the_backwards

from megalite.checkpoint.discovery import find_checkpoints
from megalite.checkpoint.reader import CheckpointReader
from megalite.errors import STOPPED_STATUS

STEPS = 140
GIVEN = (*TINY, "parallel.data=2", f"train.steps={STEPS}", "checkpoint.every=20", "checkpoint.keep_last=2")
REFUSED_WITHIN = 10.0

pytestmark = pytest.mark.full


def start(run_file: Path, folder: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megalite", "train", str(run_file), *GIVEN, f"run.dir={folder}", *overrides]
    environment = os.environ | ON_CPU | variables
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextmanager
def disturbed(run_file: Path, folder: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """A run between two of its checkpoints; nothing of it is left afterwards."""
    running = start(run_file, folder, *overrides)
    wait_for_steps(folder, running, 22)
    everybody = family(running)
    yield running
    for process in everybody:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    running.communicate()


def family(running: subprocess.Popen[str]) -> list[psutil.Process]:
    launcher = psutil.Process(running.pid)
    return [launcher, *launcher.children(recursive=True)]


def ends_within(everybody: Sequence[psutil.Process], seconds: float) -> None:
    assert psutil.wait_procs(everybody, timeout=seconds)[1] == [], "processes are left"


def last_state(folder: Path) -> dict[str, str]:
    """The digests of all that the last checkpoint holds of the training."""
    reader = CheckpointReader(folder / f"checkpoints/step_{STEPS}")
    assert reader.problems() == []
    files = reader.manifest.files.items()
    return {name: file.sha256 for name, file in files if name.endswith(".safetensors") or name == "state.json"}


@pytest.fixture(scope="session")
def goes_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Path], None]:
    """Starts a run once more by the same command, and holds its end against that of the run that nothing disturbed."""
    whole: list[Path] = []

    def go_on(run_file: Path, folder: Path) -> None:
        if not whole:
            undisturbed = tmp_path_factory.mktemp("undisturbed") / "run"
            megalite("train", str(run_file), *GIVEN, f"run.dir={undisturbed}")
            whole.append(undisturbed)
        assert not (folder / "DONE.json").exists(), "the fault came too late"
        said = megalite("train", str(run_file), *GIVEN, f"run.dir={folder}").stdout
        assert "resumed: " in said
        assert (folder / "DONE.json").exists()
        assert losses(folder) == losses(whole[0])
        assert last_state(folder) == last_state(whole[0])
        assert list(folder.rglob("*.tmp")) == []

    return go_on


GoesOn = Callable[[Path, Path], None]

# ----------------------------------------------------------------------------------------------- in a run that trains


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher(run_file: Path, tmp_path: Path, goes_on: GoesOn, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    with disturbed(run_file, folder) as running:
        everybody = family(running)
        running.send_signal(number)
        ends_within(everybody[1:], DEADLINE)
        status = running.wait(DEADLINE)
    assert status == (-number if number == signal.SIGKILL else STOPPED_STATUS)
    assert (folder / "STOPPED.json").exists() == (number != signal.SIGKILL)
    goes_on(run_file, folder)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_rank(run_file: Path, tmp_path: Path, goes_on: GoesOn, asked: int) -> None:
    folder = tmp_path / "run"
    with disturbed(run_file, folder) as running:
        rank(running, asked).terminate()
        assert running.wait(DEADLINE) == STOPPED_STATUS
    goes_on(run_file, folder)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_rank_that_is_stopped_for_good(run_file: Path, tmp_path: Path, goes_on: GoesOn, asked: int) -> None:
    folder = tmp_path / "run"
    with disturbed(run_file, folder, "train.timeout_seconds=15") as running:
        everybody = family(running)
        rank(running, asked).suspend()
        said = running.communicate(timeout=60)[0]
        ends_within(everybody[1:], DEADLINE)
    assert running.returncode == 1, said
    assert f"held up by rank {asked} on {socket.gethostname()}" in said
    goes_on(run_file, folder)


# ------------------------------------------------------------------------------------------------------ no room left


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system of one's own takes root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def make_room(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)


def test_a_disk_that_has_no_room_for_a_checkpoint(run_file: Path, small_disk: Path, goes_on: GoesOn) -> None:
    folder = small_disk / "run"
    given = [*GIVEN, f"run.dir={folder}", "checkpoint.keep_last=null"]
    refused = megalite("train", str(run_file), *given, status=2).stderr
    assert "bytes, and " in refused
    assert "are free there; earlier checkpoints are unchanged; free disk space, " in refused
    assert list(small_disk.rglob("*.tmp")) == []
    assert all(CheckpointReader(path).problems() == [] for _, path in find_checkpoints(folder / "checkpoints"))
    make_room(small_disk)
    goes_on(run_file, folder)


def test_a_disk_that_another_program_fills(run_file: Path, small_disk: Path, goes_on: GoesOn) -> None:
    """Not a byte more: neither a checkpoint nor the metrics can be written."""
    folder = small_disk / "run"
    with disturbed(run_file, folder) as running:
        with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        said = running.communicate(timeout=60)[0]
    assert running.returncode == 2, said
    assert "megalite: error: " in said
    assert "No space left on device" in said or "are free there" in said
    make_room(small_disk)
    goes_on(run_file, folder)


# ------------------------------------------------------------------------------------------------------ no more numbers


def break_down(path: str, overrides: Sequence[str], at: int) -> None:
    """Train, and have nothing but NaN in the gradients of rank 1 from step `at` on."""
    from training import build_trainer

    trainer = build_trainer(path, overrides)
    calls = iter(range(1, 1000))

    def spoil() -> None:
        if next(calls) >= at and trainer.mesh.rank == 1:
            for stage in trainer.engine.stages.values():
                for parameter in stage.parameters():
                    assert parameter.grad is not None
                    parameter.grad.fill_(float("nan"))

    after_the_backwards(trainer, spoil)
    trainer.run()


def test_nan_on_one_rank(run_file: Path, tmp_path: Path) -> None:
    given = [*SMALL, *KEPT, "train.max_bad_steps=2"]
    with pytest.raises(RankError, match="train.max_bad_steps"):
        run_distributed(break_down, 2, str(run_file), [*given, f"run.dir={tmp_path / 'run'}"], 5)
    assert run(run_file, tmp_path / "run", PAIR, *KEPT)[0] == 4
    run(run_file, tmp_path / "whole", PAIR, *KEPT)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# ------------------------------------------------------------------------------------------- faults of the next start


@pytest.fixture
def half(run_file: Path, tmp_path: Path) -> Path:
    """The folder of a run that has done a part of its steps."""
    megalite("train", str(run_file), *GIVEN, f"run.dir={tmp_path / 'run'}", "train.stop_after=40")
    return tmp_path / "run"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


class Ranks:
    """Ranks that are started one by one, as a cluster's launcher starts them on its nodes."""

    def __init__(self, run_file: Path, folder: Path, *, world_size: int = 2, port: int | None = None) -> None:
        self.run_file, self.folder, self.world_size = run_file, folder, world_size
        self.port = port or free_port()
        self.started: list[subprocess.Popen[str]] = []

    def start(self, number: int, *overrides: str) -> None:
        variables = {
            **{"RANK": str(number), "LOCAL_RANK": str(number)},
            **{"WORLD_SIZE": str(self.world_size), "LOCAL_WORLD_SIZE": str(self.world_size)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)},
        }
        self.started.append(start(self.run_file, self.folder, *overrides, **variables))

    def end(self, seconds: float) -> list[tuple[int, str]]:
        """Return the status of each, and what it said."""
        try:
            said = [process.communicate(timeout=seconds)[0] for process in self.started]
            return [(process.returncode, text) for process, text in zip(self.started, said, strict=True)]
        finally:
            for process in self.started:
                process.kill()


def test_another_setting_on_one_rank(run_file: Path, half: Path, goes_on: GoesOn) -> None:
    ranks = Ranks(run_file, half)
    began = time.monotonic()
    ranks.start(0)
    ranks.start(1, "train.optimizer.lr=1.0e-3")
    ended = ranks.end(60)
    assert time.monotonic() - began < REFUSED_WITHIN + 10  # of which Python and torch take some to come
    assert [status for status, _ in ended] == [2, 2]
    said = "".join(text for _, text in ended)
    assert said.count("train.optimizer.lr is 0.001, on rank 0") == 1
    goes_on(run_file, half)


def test_a_node_that_does_not_come(run_file: Path, half: Path, goes_on: GoesOn) -> None:
    ranks = Ranks(run_file, half)
    ranks.start(0, "train.timeout_seconds=5")
    ((status, said),) = ranks.end(60)
    assert (status, "rank 1 of 2 did not come to 127.0.0.1:" in said) == (1, True), said
    goes_on(run_file, half)


def test_another_world_size(run_file: Path, half: Path, goes_on: GoesOn) -> None:
    ranks = Ranks(run_file, half, world_size=3)
    for number in range(3):
        ranks.start(number)
    ended = ranks.end(60)
    assert [status for status, _ in ended] == [2, 2, 2]
    assert "3" in ended[0][1]
    assert "parallel" in ended[0][1]
    goes_on(run_file, half)


def test_a_port_that_is_taken(run_file: Path, half: Path, goes_on: GoesOn) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        ranks = Ranks(run_file, half, port=other.getsockname()[1])
        ranks.start(0)
        ranks.start(1, "train.timeout_seconds=20")
        ended = ranks.end(60)
    assert [status for status, _ in ended] == [2, 1]  # rank 1 sees no more than that nobody answers
    assert f"MASTER_PORT={ranks.port}: is taken on {socket.gethostname()} by another process" in ended[0][1]
    goes_on(run_file, half)


def test_two_jobs_that_build_one_index(run_file: Path, tmp_path: Path) -> None:
    order = ["data.order=megatron", "train.steps=4"]
    alone = tmp_path / "alone"
    megalite("train", str(run_file), *GIVEN, *order, f"run.dir={alone}", f"data.index_cache={tmp_path / 'own'}")
    for round_number in range(3):
        shared = f"data.index_cache={tmp_path / f'shared{round_number}'}"
        folders = [tmp_path / f"job{round_number}{name}" for name in "ab"]
        jobs = [start(run_file, folder, *order, shared) for folder in folders]
        for job, folder in zip(jobs, folders, strict=True):
            said = job.communicate(timeout=120)[0]
            assert job.returncode == 0, said
            assert losses(folder) == losses(alone)
        built = {path.name for path in (tmp_path / f"shared{round_number}").iterdir() if path.is_dir()}
        assert built == {path.name for path in (tmp_path / "own").iterdir() if path.is_dir()}
