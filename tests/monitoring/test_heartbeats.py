"""Heartbeats: what a rank leaves of where it is, who is named as behind, and how a rank that hangs ends."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from commands import TINY, megalite
from harness import run_distributed
from processes import is_alive, pids, start_launcher, wait_until
from training import build_trainer

from megalite.checkpoint.store import Part
from megalite.cli import main
from megalite.monitoring.heartbeat import (
    FOLDER,
    SILENT_SECONDS,
    Heartbeat,
    HeartbeatThread,
    Phase,
    Progress,
    read_heartbeats,
    slow_ranks,
)
from megalite.monitoring.run_status import run_status

NOW = 1_000_000.0
QUICK = 0.05
"""How often a rank writes where a test waits for several heartbeats, in seconds."""


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.monitoring.heartbeat.POLL_SECONDS", QUICK)


def beat(rank: int, step: int, phase: Phase = "compute", moved: float = 0.0, written: float = 0.0) -> Heartbeat:
    """A beat whose rank moved, and wrote, so many seconds ago."""
    return Heartbeat(rank, f"node{rank}", 100 + rank, step, phase, NOW - moved, NOW - written)


@pytest.mark.parametrize(
    ("heartbeats", "behind"),
    [
        pytest.param([], [], id="no rank"),
        pytest.param([beat(0, 7), beat(1, 6)], [], id="a step apart while they move"),
        pytest.param([beat(0, 7), beat(1, 3, moved=60)], [1], id="one stands still while others move"),
        pytest.param([beat(0, 7, moved=60), beat(1, 7, "data", moved=60)], [1], id="all wait for one that reads"),
        pytest.param([beat(0, 7, moved=60), beat(1, 7, moved=60)], [], id="all hang in one place"),
        pytest.param(
            [beat(0, 7, moved=60), beat(1, 7, moved=60, written=60), beat(2, 6, moved=60)], [1], id="one is silent"
        ),
    ],
)
def test_the_ranks_that_hold_the_others_up_are_found(heartbeats: list[Heartbeat], behind: list[int]) -> None:
    assert [found.rank for found in slow_ranks(heartbeats, NOW)] == behind


def test_a_rank_writes_where_it_is_when_that_changes(tmp_path: Path, quick_beats: None) -> None:
    progress = Progress()
    with HeartbeatThread(tmp_path, 1, 2, progress, timeout=60):
        wait_until(lambda: len(read_heartbeats(tmp_path, 2)) == 1)
        (first,) = read_heartbeats(tmp_path, 2)
        assert (first.rank, first.step, first.phase, first.pid) == (1, 0, "start", os.getpid())
        assert abs(first.time - time.time()) < 5
        progress.enter("update", 12)
        wait_until(lambda: read_heartbeats(tmp_path, 2)[0].step == 12)
        (second,) = read_heartbeats(tmp_path, 2)
        assert second.phase == "update"
        assert second.moved > first.moved
        written = (tmp_path / FOLDER / "rank_1.json").stat().st_mtime_ns
        time.sleep(5 * QUICK)
        assert (tmp_path / FOLDER / "rank_1.json").stat().st_mtime_ns == written, "it wrote though nothing changed"


def test_what_is_no_beat_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    for rank, text in enumerate(("", "[]", '{"rank": 2}', "null")):
        (tmp_path / FOLDER / f"rank_{rank}.json").write_text(text)
    assert read_heartbeats(tmp_path, 5) == []


def test_a_folder_that_takes_nothing_does_not_end_a_rank(tmp_path: Path, quick_beats: None) -> None:
    (tmp_path / FOLDER).write_text("a file in place of the folder")
    thread = HeartbeatThread(tmp_path, 0, 1, Progress(), timeout=60)
    with thread:
        time.sleep(3 * QUICK)
        assert thread._thread.is_alive()


# ---- a rank that hangs

HANGS = """
    from megalite.monitoring.heartbeat import HeartbeatThread, Progress
    from pathlib import Path
    def read_batch():
        time.sleep(100)
    progress = Progress()
    with HeartbeatThread(here, rank, 2, progress, timeout=3.5):
        progress.enter("compute", 7)
        for _ in range(8):
            time.sleep(0.5)
            progress.touch()
        leave_pid(f"ready{rank}", os.getpid())
        if rank == 1: progress.enter("data", 7)
        read_batch()
"""


def test_a_rank_that_hangs_shows_its_stacks_and_who_it_waits_for(
    tmp_path: Path,
    started: list[subprocess.Popen[str]],  # noqa: F811
) -> None:
    launcher = start_launcher(started, tmp_path, 2, HANGS)
    pids(tmp_path, 4)
    _, err = launcher.communicate(timeout=15)
    # Whichever ends first, the launcher shows its words; those of the other are in its log.
    logs = err + "".join((tmp_path / f"logs/rank_{rank}.log").read_text() for rank in range(2))
    assert launcher.returncode == 1
    assert "no progress for train.timeout_seconds=3.5 in compute of step 7; its stacks:" in logs
    assert " in read_batch" in logs
    assert "held up by rank 1 on " in logs
    assert ": data of step 7 for " in logs


def test_to_start_takes_as_long_as_it_takes() -> None:
    code = f"""if True:
        import sys, time
        from pathlib import Path
        from megalite.monitoring import heartbeat
        heartbeat.POLL_SECONDS = {QUICK}
        progress = heartbeat.Progress()
        with heartbeat.HeartbeatThread(Path(sys.argv[1]), 0, 1, progress, timeout={QUICK}): time.sleep({8 * QUICK})
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", code, folder], check=True)


# ---- megalite status


def write_run(folder: Path, heartbeats: list[Heartbeat], steps: int = 4, skew: float = 0.0) -> None:
    """Leave what a run of two tensor ranks leaves in its folder; the clocks of its hosts are `skew` seconds, and twice
    that, ahead of the file system's."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    now = time.time()
    for one in heartbeats:
        record = {name: getattr(one, name) for name in ("rank", "host", "pid", "step", "phase")}
        ahead = skew * (1 + one.rank)
        record |= {"moved": now - (NOW - one.moved) + ahead, "time": now - (NOW - one.time) + ahead}
        path = folder / FOLDER / f"rank_{one.rank}.json"
        path.write_text(json.dumps(record))
        written = now - (NOW - one.time)
        os.utime(path, (written, written))
    lines = [
        {"step": step, "loss": 3.0 - step / 8, "tokens_per_second": 1000.0, "step_seconds": 2.0}
        for step in range(1, steps + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": steps, "valid_loss": 1.0}])
    (folder / "metrics.jsonl").write_text(text + '{"step": 5, "lo')


@pytest.fixture
def run_folder(run_file: Path, tmp_path: Path) -> Path:
    """The folder of a run of two ranks, with nothing in it but its resolved configuration."""
    from megalite.planning.plan import prepare

    config = prepare(run_file, [*TINY, "parallel.tensor=2", "train.steps=100"], None).config
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(config.to_yaml())
    return tmp_path / "run"


def test_status_of_a_run_that_runs_names_who_is_behind(
    run_folder: Path, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(run_folder, [beat(0, 5), beat(1, 3, "data", moved=60)])
    assert main(["status", str(run_file)]) == 0  # here: a process that starts slowly would find both silent
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run_folder}: running"
    assert lines[1] == "step 4/100 | loss 2.5000 | 1,000 tok/s | 2.00 s a step | ETA 0:03:12"
    assert lines[2] == "2 ranks: 1 behind or silent, 0 not heard of yet"
    assert lines[3].startswith("  rank 1 on node1: data of step 3 for 6")


@pytest.mark.parametrize("skew", [-3600.0, -20.0, 20.0, 3600.0])
def test_clocks_of_hosts_that_differ_make_no_rank_silent_or_behind(run_folder: Path, skew: float) -> None:
    write_run(run_folder, [beat(0, 5), beat(1, 5)], skew=skew)
    status = run_status(run_folder)
    assert (status.state, status.slow_ranks) == ("running", [])
    write_run(run_folder, [beat(0, 5), beat(1, 3, "data", moved=60)], skew=skew)
    status = run_status(run_folder)
    assert [found.rank for found in status.slow_ranks] == [1]
    assert status.slow_ranks[0].describe(status.now).startswith("rank 1 on node1: data of step 3 for 6")
    write_run(run_folder, [beat(0, 5), beat(1, 5, written=SILENT_SECONDS + 9)], skew=skew)
    assert [found.rank for found in run_status(run_folder).slow_ranks] == [1]


@pytest.mark.parametrize(("ranks", "writes"), [(2, 6), (200, 3), (10_000, 1)])
def test_many_ranks_write_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, writes: int) -> None:
    """In five seconds of work that goes on all the time; a rank never rests for longer than makes it silent."""
    progress, clock, written = Progress(), [100.0], []
    thread = HeartbeatThread(tmp_path, 0, ranks, progress, timeout=60)
    monkeypatch.setattr("megalite.monitoring.heartbeat.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: written.append(clock[0]))

    class Seconds:
        def wait(self, seconds: float) -> bool:
            clock[0] += seconds
            progress.touch()
            return clock[0] > 105

    thread._closed = Seconds()  # pyright: ignore[reportAttributeAccessIssue]
    thread._loop()
    assert len(written) == writes + (ranks == 10_000)
    assert thread._seconds < SILENT_SECONDS / 2


@pytest.mark.parametrize(
    ("heartbeats", "end", "state", "missing"),
    [
        ([beat(0, 5)], None, "running", [1]),
        ([beat(0, 5, written=SILENT_SECONDS + 9), beat(1, 5, written=SILENT_SECONDS + 9)], None, "dead", []),
        ([], None, "dead", [0, 1]),
        ([beat(0, 5), beat(1, 5)], "STOPPED.json", "stopped", []),
        ([beat(0, 5), beat(1, 5)], "DONE.json", "done", []),
    ],
)
def test_the_state_of_a_run_is_told_from_its_files(
    run_folder: Path, heartbeats: list[Heartbeat], end: str | None, state: str, missing: list[int]
) -> None:
    write_run(run_folder, heartbeats)
    if end is not None:
        (run_folder / end).write_text("{}")
    status = run_status(run_folder)
    assert (status.state, status.missing) == (state, missing)
    assert len(status.slow_ranks) == (2 if state == "dead" and heartbeats else 0)


def test_what_is_odd_in_a_runs_files_is_passed_over(run_folder: Path) -> None:
    write_run(run_folder, [beat(0, 5), beat(1, 5)])
    (run_folder / FOLDER / "rank_0.json").write_text('{"rank": 0')
    odd = {"rank": 1, "host": "a", "pid": 1, "step": "two", "phase": "data", "moved": "now", "time": "then"}
    (run_folder / FOLDER / "rank_1.json").write_text(json.dumps(odd))
    with (run_folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(
            '\n{"loss": 1, "step": 9}\n[3]\n{"loss": "x", "step": 9, "step_seconds": 1, "tokens_per_second": 2}\n'
        )
    status = run_status(run_folder)
    assert (status.heartbeats, status.missing, status.steps[-1]["step"]) == ([], [0, 1], 4)
    for content in ("3", "[1, 2]", "{}", ""):
        (run_folder / "STOPPED.json").write_text(content)
        assert megalite("status", str(run_folder)).stdout.startswith(f"{run_folder}: stopped\n")


def test_there_is_no_status_of_no_run(tmp_path: Path) -> None:
    refused = megalite("status", str(tmp_path), status=2).stderr
    assert refused.startswith(f"megalite: error: {tmp_path}: holds no run: it has no config.yaml")


# ---- a whole run


@pytest.mark.full
def test_a_stopped_rank_is_found_and_the_run_ends(run_file: Path, tmp_path: Path) -> None:
    given = [*TINY, "parallel.tensor=2", "parallel.pipeline=2", "train.steps=100000", "train.timeout_seconds=20"]
    command = [sys.executable, "-m", "megalite", "train", str(run_file), *given]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(read_heartbeats(tmp_path / "run", 4)) == 4, 120)
        wait_until(lambda: all(found.step > 1 for found in read_heartbeats(tmp_path / "run", 4)), 120)
        stopped = read_heartbeats(tmp_path / "run", 4)[2]
        psutil.Process(stopped.pid).suspend()
        assert run_status(run_file).state == "running"
        time.sleep(SILENT_SECONDS + 2)
        assert [found.rank for found in run_status(run_file).slow_ranks] == [2]
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 1
    said = err + "".join(path.read_text() for path in (tmp_path / "run/logs").iterdir())
    assert f"held up by rank 2 on {stopped.host}: " in said
    assert said.count("no progress for train.timeout_seconds=20") >= 2, "of several ranks one shows its stacks alone"
    assert not is_alive(stopped.pid)


# ---- a save that takes its time


def save_while_watched(path: str, overrides: Sequence[str], rank: int, naps: Sequence[float]) -> tuple[float, float]:
    """Save while one rank's thread sleeps before its parts; return how long that took, and how long this rank stood
    still in it at most."""
    from megalite.training import checkpointing

    checkpointing.PROGRESS_INTERVAL_SECONDS = 0.1
    trainer = build_trainer(path, overrides)
    trainer.step(1)
    if trainer.mesh.rank == rank:
        plain, left = checkpointing.parts, iter(naps)

        def slow(part: Part) -> Part:
            def load() -> np.ndarray:
                time.sleep(next(left, 0.0))
                return part.load()

            return replace(part, load=load)

        checkpointing.parts = lambda fragments: map(slow, plain(fragments))
    still, ended = 0.0, threading.Event()

    def watch() -> None:
        nonlocal still
        while not ended.wait(0.02):
            still = max(still, trainer.progress.seconds_since_progress())

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.monotonic()
    trainer.save(1)
    trainer.step(2)  # where the save goes on in the background
    trainer.checkpointer.wait()
    took = time.monotonic() - began
    ended.set()
    watching.join()
    trainer.close()
    return took, still


@pytest.mark.parametrize(
    ("rank", "naps", "asynchronous"),
    [
        pytest.param(0, [0.2] * 16, "false", id="rank 0 slow"),
        pytest.param(1, [0.2] * 16, "false", id="rank 1 slow", marks=pytest.mark.full),
        pytest.param(1, [0.2] * 16, "true", id="rank 1 slow in the background"),
        pytest.param(1, [3.2], "false", id="rank 1 stuck"),
    ],
)
def test_ranks_move_as_long_as_a_save_does(
    run_file: Path, tmp_path: Path, rank: int, naps: list[float], asynchronous: str
) -> None:
    given = [*TINY, "parallel.data=2", "checkpoint.every=1", f"checkpoint.async={asynchronous}", "data.split=null"]
    found = run_distributed(save_while_watched, 2, str(run_file), [*given, f"run.dir={tmp_path / 'run'}"], rank, naps)
    for took, still in found:
        assert took > 3
        assert still > 2.5 if len(naps) == 1 else still < 1.5
