"""STATE.json: what a start says of itself, who may write over what, and what `status` makes of it."""

import io
import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from commands import TINY, megalite

from megalite import launch
from megalite.cli import main
from megalite.files import LOCK, filesystem_time, folder_lock, write_atomically
from megalite.launch import announce, clear_announcement, clear_announcement_before_stderr, start_id
from megalite.launch.announce import CLEAR
from megalite.monitoring.run_state import STATE, RunState, RunStateWriter, read_state
from megalite.monitoring.run_status import run_status
from megalite.planning.finished import finished_step

SILENT = 20.0


def marker(folder: Path, start: str = "this", announce: Any = lambda text: None) -> RunStateWriter:
    return RunStateWriter(folder, start, ranks=4, steps=100, announce=announce)


def age(folder: Path, seconds: float) -> None:
    """Let the file be of so many seconds ago."""
    now = filesystem_time(folder)
    os.utime(folder / STATE, (now - seconds, now - seconds))


def told(folder: Path) -> RunState:
    found = read_state(folder)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------ who writes what


def test_the_life_of_a_run(tmp_path: Path) -> None:
    said: list[str] = []
    ours = marker(tmp_path / "new/run", announce=said.append)
    ours.starting("starting 4 ranks")
    ours.starting("building the model")
    assert said == ["starting 4 ranks", "building the model"]
    found = told(tmp_path / "new/run")
    assert (found.state, found.doing, found.ranks, found.steps, found.pid) == (
        *("starting", "building the model", 4, 100),
        os.getpid(),
    )
    ours.running()
    assert told(tmp_path / "new/run").state == "running"
    ours.ended("stopped", step=7, reason="STOP", checkpoint="c")
    found = told(tmp_path / "new/run")
    assert (found.state, found.step, found.reason, found.checkpoint, found.doing) == ("stopped", 7, "STOP", "c", "")
    assert [path.name for path in (tmp_path / "new/run").iterdir()] == [STATE]


def test_the_first_failure_of_a_start_is_kept(tmp_path: Path) -> None:
    first, second = marker(tmp_path), marker(tmp_path)
    first.starting("building the model")
    second.starting("as another process of it")
    first.failed("rank 2: out of memory")
    second.failed("rank 0: connection closed by peer")
    second._write(second._now)
    assert told(tmp_path).reason == "rank 2: out of memory"
    assert told(tmp_path).state == "failed"


def test_a_later_start_writes_over_how_an_earlier_one_ended(tmp_path: Path) -> None:
    for start in ("this", "another"):  # a launcher's ranks may meet at the place of the start before
        earlier = marker(tmp_path, start)
        earlier.starting("a")
        earlier.failed("why")
        later = marker(tmp_path)
        later.starting("b")
        assert (told(tmp_path).state, told(tmp_path).doing) == ("starting", "b")
        later.failed("another reason")
        assert told(tmp_path).reason == "another reason"


def test_the_word_of_a_run_that_is_in_the_folder_stays(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "run.dir"):
        marker(tmp_path, "theirs").running()
        ours = marker(tmp_path, "ours")
        ours.starting("a second run")
        ours.failed("run.dir is in use")
        assert told(tmp_path).start == "theirs"
        assert told(tmp_path).state == "running"
    ours.failed("and once it has gone")
    assert told(tmp_path).start == "ours"


def test_the_file_is_kept_fresh_until_training_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.monitoring.run_state.REFRESH_SECONDS", 0.02)
    ours = marker(tmp_path)
    ours.starting("importing")
    written = threading.Event()
    plain = os.replace

    def replace(source: Any, target: Any) -> None:
        plain(source, target)
        written.set()

    monkeypatch.setattr("megalite.monitoring.run_state.os.replace", replace)
    ours.start_refreshing()
    assert written.wait(20)
    ours.running()
    assert told(tmp_path).state == "running"


@pytest.mark.parametrize("found", ["a file in place of the folder", "a folder in place of the file"])
def test_what_cannot_be_written_is_no_error(tmp_path: Path, found: str) -> None:
    folder = tmp_path / "run"
    if found.startswith("a file"):
        folder.touch()
    else:
        (folder / STATE / "deep").mkdir(parents=True)
    ours = marker(folder)
    ours.starting("a")
    ours.failed("b")
    assert read_state(folder) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{", '{"state": "lost"}', '{"state": ["starting"], "start": 1, "ranks": "a"}']
)
def test_what_is_no_state_is_passed_over(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE).write_text(content)
    assert read_state(tmp_path) is None


def test_the_processes_of_a_start_share_a_name() -> None:
    by_hand = start_id({}, "a", 7)
    assert start_id({"RANK": "1", "MEGALITE_LAUNCHER_PID": "7", "MASTER_PORT": "5"}, "a", 99) == by_hand
    assert start_id({}, "b", 7) != by_hand
    torchrun = {"RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "5"}
    assert start_id(torchrun, "a", 1) == start_id({**torchrun, "RANK": "0"}, "b", 2) == "node1:5"


# ------------------------------------------------------------------------------------------------ what status says


@pytest.mark.parametrize(
    ("seconds", "pid", "host", "state"),
    [
        (0, 2**22 + 1, "another", "starting"),
        (SILENT, os.getpid(), None, "starting"),
        (SILENT, os.getpid(), "another", "dead"),
        (SILENT, 2**22 + 1, None, "dead"),
        (SILENT, 2**80, None, "dead"),
        (500, os.getpid(), None, "dead"),
    ],
    ids=["elsewhere", "here", "silent elsewhere", "gone", "no process", "silent here"],
)
def test_a_start_is_told_from_its_first_second_and_whether_it_lives(
    tmp_path: Path, seconds: float, pid: int, host: str | None, state: str
) -> None:
    """There is no config.yaml yet, and what an earlier run has left does not count."""
    marker(tmp_path).starting("building the model")
    content = json.loads((tmp_path / STATE).read_text()) | {"pid": pid, "host": host or socket.gethostname()}
    (tmp_path / STATE).write_text(json.dumps(content))
    for left in ("DONE.json", "STOPPED.json"):
        (tmp_path / left).write_text("{}")
    age(tmp_path, seconds)
    status = run_status(tmp_path)
    assert (status.state, status.ranks, status.total_steps) == (state, 4, 100)


@pytest.mark.processes
def test_status_speaks_of_every_state(tmp_path: Path, run_file: Path) -> None:
    from megalite.planning.plan import prepare

    folder = tmp_path / "run"
    ours = marker(folder)

    def lines() -> list[str]:
        return megalite("status", str(folder)).stdout.splitlines()

    ours.starting("building the model")
    assert lines() == [f"{folder}: starting 4 ranks: building the model", "no step of 100 is done yet"]
    age(folder, 200)
    (folder / "checkpoints/step_2.tmp").mkdir(parents=True)  # what a save that was killed leaves is no checkpoint
    first, _, hint = lines()
    assert first.startswith(f"{folder}: dead, while it was starting (building the model): nothing was written for 2")
    assert hint == f"logs of the ranks: {folder}/logs; started again, it begins anew: there is no checkpoint yet"
    ours.failed("data.train: no such file\nand more")
    said = "data.train: no such file (and 1 more lines)"
    assert lines()[0] == f"{folder}: failed, while it was starting (building the model): {said}"
    assert len(lines()) == 3
    ours.running()
    ours.failed("rank 2 on node1 ended with status 1")
    assert lines()[0] == f"{folder}: failed: rank 2 on node1 ended with status 1"
    assert lines()[2] == "4 ranks: 0 behind or silent, 4 not heard of yet"
    (folder / "config.yaml").write_text(prepare(run_file, [*TINY], None).config.to_yaml())
    ours.ended("stopped", step=4, reason="train.stop_after=4", checkpoint="runs/checkpoints/step_4")
    assert lines() == [
        f"{folder}: stopped after step 4, asked by train.stop_after=4; runs/checkpoints/step_4",
        "no step of 10 is done yet",
        "to go on: start it again without train.stop_after, or with a later one; it goes on from there",
    ]
    ours.ended("stopped", step=4, reason="STOP")
    write_atomically(folder / "STOPPED.json", b'{"step": 5, "reason": "SIGTERM", "checkpoint": null}')
    first, _, hint = lines()
    assert first == f"{folder}: stopped after step 5, asked by SIGTERM; no checkpoint"
    assert hint == "to go on: start it again as before; it begins with the newest checkpoint there is, or anew"
    (folder / "DONE.json").write_text("{}")
    ours.ended("done", step=10)
    assert lines()[0] == f"{folder}: done"


def test_status_of_a_run_from_before_this_file(tmp_path: Path, run_file: Path) -> None:
    from megalite.planning.plan import prepare

    (tmp_path / "config.yaml").write_text(prepare(run_file, [*TINY], None).config.to_yaml())
    assert run_status(tmp_path).state == "dead"
    (tmp_path / "DONE.json").write_text("{}")
    assert run_status(tmp_path).state == "done"


def test_status_of_a_folder_of_runs_is_a_line_for_each(
    tmp_path: Path, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megalite.planning.plan import prepare

    runs = tmp_path / "runs"
    for name in ("a", "group/b", "c", ".hidden", "empty"):
        (runs / name).mkdir(parents=True)
    config = prepare(run_file, [*TINY], None).config.to_yaml()
    step = {"step": 4, "loss": 2.5, "tokens_per_second": 1234.5, "step_seconds": 0.1}
    (runs / "a" / "config.yaml").write_text(config)
    (runs / "a" / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    (runs / "a" / "DONE.json").write_text("{}")
    (runs / "a" / "earlier" / "1").mkdir(parents=True)
    (runs / "a" / "earlier" / "1" / "config.yaml").write_text(config)
    marker(runs / "group" / "b").failed("no such file\nand more")
    (runs / "c" / "config.yaml").write_text("run: 3\n")
    assert main(["status", str(runs)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "step", "loss", "tok/s"]
    assert [line.split()[:2] for line in lines] == [["a", "done"], ["c", "unreadable"], ["group/b", "failed"]]
    assert lines[0].split()[2:] == ["4/10", "2.5000", "1,234"]
    assert "config.yaml" in lines[1]
    assert "no such file" in lines[2]
    assert main(["status", str(runs / "empty")]) == 2
    assert "a folder of runs" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def put_in_place(monkeypatch: pytest.MonkeyPatch, out_is_terminal: bool, err_is_terminal: bool) -> tuple[Any, Any]:
    out, err = (Terminal() if terminal else io.StringIO() for terminal in (out_is_terminal, err_is_terminal))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


@pytest.mark.parametrize("err_is_terminal", [True, False])
def test_a_terminal_shows_one_line_that_is_rewritten(monkeypatch: pytest.MonkeyPatch, err_is_terminal: bool) -> None:
    out, err = put_in_place(monkeypatch, True, err_is_terminal)
    announce("checking run.yaml")
    announce("building " + "a model of a long name " * 9)
    clear_announcement()
    first, second, third = out.getvalue().split(CLEAR)[1:]
    assert first == "megalite: checking run.yaml ..."
    assert second.startswith("megalite: building a model")
    assert len(second) < 90
    assert "\n" not in out.getvalue()
    assert third == err.getvalue() == ""
    clear_announcement_before_stderr()
    assert err.getvalue() == (CLEAR if err.isatty() else "")


@pytest.mark.parametrize("err_is_terminal", [True, False])
def test_elsewhere_there_are_plain_lines_beside_the_output(
    monkeypatch: pytest.MonkeyPatch, err_is_terminal: bool
) -> None:
    out, err = put_in_place(monkeypatch, False, err_is_terminal)
    announce("checking run.yaml")
    announce("starting 2 ranks")
    clear_announcement()
    clear_announcement_before_stderr()
    assert out.getvalue() == ""
    assert err.getvalue() == "megalite: checking run.yaml\nmegalite: starting 2 ranks\n"


def test_a_closed_stream_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    launch.clear_announcement()


# ------------------------------------------------------------------------------------------------ a whole run


@pytest.mark.processes
def test_a_run_tells_what_it_does_and_a_finished_one_starts_no_rank(run_file: Path, tmp_path: Path) -> None:
    from megalite.planning.plan import prepare

    given = [str(run_file), *TINY, "train.steps=4", "parallel.data=2", "checkpoint.every=2"]
    folder = tmp_path / "run"
    first = megalite("train", *given, "train.stop_after=2")
    assert first.stderr.splitlines()[:6] == [
        "megalite: checking run.yaml",
        "megalite: starting 2 ranks",
        "megalite: importing torch and DeepSpeed",
        "megalite: waiting for the other rank",
        "megalite: opening the data",
        "megalite: building the model",
    ]
    status = megalite("status", str(run_file)).stdout.splitlines()
    assert status[0] == f"{folder}: stopped after step 2, asked by train.stop_after=2; {folder}/checkpoints/step_2"
    assert not (folder / "STOPPED.json").exists()

    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != LOCK}
    for _ in range(2):
        again = megalite("train", *given, "train.stop_after=2")
        assert again.stdout.splitlines() == ["nothing is left to train: step 2 of 4 is done", f"run: {folder}"]
        assert again.stderr == "megalite: checking run.yaml\n"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != LOCK} == files

    megalite("train", *given)
    assert told(folder).state == "done"
    assert megalite("status", str(run_file)).stdout.startswith(f"{folder}: done\n")
    plan = prepare(run_file, given[1:], None)
    assert finished_step(plan) == 4
    for other in ("train.steps=6", "resume=never", f"resume={folder}/checkpoints/step_2"):
        assert finished_step(prepare(run_file, [*given[1:], other], None)) is None, other
    # In doubt the ranks look: nothing was said of the end, it was killed there, or the newest checkpoint is not whole.
    done, state = (folder / "DONE.json").read_bytes(), (folder / STATE).read_bytes()
    for content in (None, b"", b"[]", b'{"step": 3}'):
        (folder / "DONE.json").unlink()
        if content is not None:
            (folder / "DONE.json").write_bytes(content)
        else:
            (folder / "DONE.json").touch()
        assert finished_step(plan) is None
    (folder / "DONE.json").write_bytes(done)
    (folder / STATE).write_bytes(state.replace(b'"done"', b'"running"'))
    assert finished_step(plan) is None
    (folder / STATE).unlink()  # as a run of before this file left it
    assert finished_step(plan) == 4
    weights = next((folder / "checkpoints/step_4").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert finished_step(plan) is None


@pytest.mark.processes
def test_a_failed_run_says_why(run_file: Path, tmp_path: Path) -> None:
    given = [str(run_file), *TINY, "train.steps=4", "checkpoint.every=2", "parallel.data=2"]
    megalite("train", *given, "train.stop_after=2")
    state = tmp_path / "run/checkpoints/step_2/state.json"
    state.write_bytes(state.read_bytes()[:-2])
    refused = megalite("train", *given, status=2)
    assert "no checkpoint is whole" in refused.stderr
    lines = megalite("status", str(run_file)).stdout.splitlines()
    start = f"{tmp_path}/run: failed, while it was starting (building the model): {tmp_path}/run/checkpoints/step_2: "
    assert lines[0].startswith(start + "state.json has ")
