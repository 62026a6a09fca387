"""Launching: who a rank is under every launcher, and that a run ends whole, whichever process dies first.

The ranks here are small programs of real processes: what they do when one is killed does not depend on training.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from processes import DEADLINE, is_alive, pids, program, start_launcher, wait_until

from megalite.errors import STOPPED_STATUS, UserError
from megalite.launch import LaunchEnvironment, is_interactive_shell, launch_environment, launch_local, tee_to_log
from megalite.launch.environment import LAUNCHER_PID, first_host

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def assert_nobody_lives(processes: list[int], seconds: float = DEADLINE) -> None:
    wait_until(lambda: not any(map(is_alive, processes)), seconds)


# ---- who am I


def environment(launcher: str, **more: object) -> dict[str, object]:
    return {"launcher": launcher, "rank": 5, "world_size": 8, "local_rank": 1, "local_world_size": 4, **more}


RANKED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29501"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[03-08]",
    "SLURM_JOB_ID": "4711",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MASTER = {"master_address": "node0", "master_port": 29501}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param(
            RANKED | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"},
            environment("torchrun", **MASTER),
            id="torchrun",
        ),
        pytest.param(
            RANKED | {"LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"},
            environment("deepspeed", **MASTER),
            id="deepspeed",
        ),
        pytest.param(
            RANKED | {"LOCAL_WORLD_SIZE": "4", LAUNCHER_PID: "1"}, environment("megalite", **MASTER), id="megalite"
        ),
        pytest.param(RANKED, environment("environment", **MASTER) | {"local_world_size": 8}, id="anybody else"),
        pytest.param(
            RANKED | SLURM | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"},
            environment("torchrun", **MASTER),
            id="torchrun in a Slurm job",
        ),
        pytest.param(SLURM, environment("slurm", master_address="gpu07", master_port=22573), id="srun"),
        pytest.param(
            SLURM | {"MASTER_ADDR": "node0", "MASTER_PORT": "29501"}, environment("slurm", **MASTER), id="srun, told"
        ),
        pytest.param(OPENMPI, environment("openmpi", master_address=None, master_port=None), id="mpirun"),
        pytest.param(
            OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"},
            environment("openmpi", master_address="127.0.0.1", master_port=None) | {"local_world_size": 8},
            id="mpirun on one machine",
        ),
        pytest.param(
            OPENMPI | SLURM | {"SLURM_PROCID": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "29501"},
            environment("openmpi", **MASTER),
            id="mpirun in a Slurm job",
        ),
    ],
)
def test_every_launcher_says_who_a_rank_is(variables: Mapping[str, str], expected: Mapping[str, object]) -> None:
    found = launch_environment(variables)
    assert found is not None
    assert {name: getattr(found, name) for name in expected} == expected


SHELL = {**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_PTY_PORT": "38151"}
"""What `srun --pty bash` leaves in the shell."""


@pytest.mark.parametrize(
    ("variables", "is_shell"),
    [
        (SHELL, True),
        (SHELL | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, True),  # in an allocation of eight
        (SHELL | {"SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, True),
        ({name: SHELL[name] for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_PTY_PORT")}, True),
        (SHELL | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, False),  # srun again, in that shell
        ({name: value for name, value in SHELL.items() if name != "SLURM_PTY_PORT"}, False),  # srun of one rank
        (SLURM, False),
        ({}, False),
        ({"SLURM_PTY_PORT": "1", "SLURM_NTASKS": "1"}, False),  # no task of Slurm's at all
        (SHELL | RANKED, False),  # torchrun or deepspeed in that shell
    ],
)
def test_a_shell_of_slurm_is_no_rank(variables: dict[str, str], is_shell: bool) -> None:
    assert is_interactive_shell(variables) == is_shell
    if is_shell:
        assert launch_environment(variables) is None


@pytest.mark.parametrize("variables", [{}, {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8"}, {"WORLD_SIZE": "8"}])
def test_by_hand_there_is_no_rank(variables: Mapping[str, str]) -> None:
    assert launch_environment(variables) is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK .* WORLD_SIZE "),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK .* LOCAL_RANK "),
        (RANKED | {"RANK": "8"}, r"rank 8 .* 0\.\.7"),
        (RANKED | {"LOCAL_RANK": "4", "LOCAL_SIZE": "4"}, r"local rank 4 .* 0\.\.3"),
        (RANKED | {"RANK": "-1"}, "RANK='-1' "),
        (RANKED | {"MASTER_PORT": "http"}, "MASTER_PORT='http' "),
        ({"SLURM_PROCID": "0"}, "SLURM_PROCID .* SLURM_NTASKS .*; .*`env -u SLURM_PROCID`"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"}, "batch script.*; .*`srun`"),
    ],
)
def test_half_an_environment_is_the_users_error(variables: Mapping[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch_environment(variables)


def test_a_rank_tells_torch_its_place_by_variables() -> None:
    found = launch_environment(SLURM)
    assert found is not None
    assert found.variables() == dict(zip(RANK_VARIABLES, ("5", "8", "1", "4", "gpu07", "22573"), strict=True))


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_where_ranks_meet_must_be_known(missing: str) -> None:
    found = launch_environment({name: value for name, value in RANKED.items() if name != missing})
    assert found is not None
    with pytest.raises(UserError, match=f"{missing} is not set"):
        found.variables()


def test_the_steps_of_a_slurm_job_meet_at_different_ports() -> None:
    ports = {launch_environment(SLURM | {"SLURM_STEP_ID": str(step)}) for step in range(4)}
    assert len({found.master_port for found in ports if isinstance(found, LaunchEnvironment)}) == 4


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[003-010,012],login1", "gpu003"),
        ("gpu[12,14]", "gpu12"),
        ("rack[2-3]-node[01-04],x", "rack2-node01"),
    ],
)
def test_first_host_of_a_slurm_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


# ---- launching on this machine


def test_ranks_know_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    body = """
        import json
        (here / f"{rank}.json").write_text(json.dumps(dict(os.environ)))
    """
    assert launch_local([str(tmp_path)], 3, tmp_path / "logs", command=program(body)) == 0
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [rank["RANK"] for rank in ranks] == [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "2"]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {rank["LOCAL_WORLD_SIZE"] for rank in ranks} == {"3"}
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"}
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    assert {rank["OMP_NUM_THREADS"] for rank in ranks} == {str(max(1, len(os.sched_getaffinity(0)) // 3))}
    found = launch_environment(ranks[2])
    assert found is not None
    assert (found.launcher, found.rank) == ("megalite", 2)


def test_the_users_number_of_threads_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    body = "sys.exit(os.environ['OMP_NUM_THREADS'] != '7')"
    assert launch_local([str(tmp_path)], 1, tmp_path / "logs", command=program(body)) == 0


def test_rank_0_has_the_console_and_the_others_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
        print(f"out {rank}")
        print(f"err {rank} \N{SNOWMAN}", file=sys.stderr)
    """
    for _ in range(2):  # the second time as after a restart: logs go on
        assert launch_local([str(tmp_path)], 3, tmp_path / "logs", command=program(body)) == 0
        out, err = capfd.readouterr()
        assert out == "out 0\n"
        assert err == "err 0 \N{SNOWMAN}\n"
    assert (tmp_path / "logs/rank_0.log").read_text() == "err 0 \N{SNOWMAN}\n" * 2
    assert (tmp_path / "logs/rank_2.log").read_text() == "out 2\nerr 2 \N{SNOWMAN}\n" * 2


def test_a_log_that_takes_no_more_ends_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank_0.log").symlink_to("/dev/full")
    body = """
        for number in range(2):
            print(f"err {number}", file=sys.stderr, flush=True)
            time.sleep(0.2)
    """
    assert launch_local([str(tmp_path)], 1, tmp_path / "logs", command=program(body)) == 0
    lost, *said = capfd.readouterr().err.splitlines()
    assert lost.startswith(f"megalite: {tmp_path}/logs/rank_0.log ")
    assert lost.endswith(": No space left on device")
    assert said == ["err 0", "err 1"]


def test_the_port_is_nobody_elses_until_rank_0_listens(tmp_path: Path) -> None:
    body = """
        import socket
        port = int(os.environ["MASTER_PORT"])
        try:
            socket.socket().bind(("", port))
        except OSError:
            from torch.distributed import TCPStore
            store = TCPStore("127.0.0.1", port, 1, is_master=True)
            store.set("key", "value")
            os._exit(0)
        os._exit(3)
    """
    assert launch_local([str(tmp_path)], 1, tmp_path / "logs", command=program(body)) == 0


def test_logs_that_cannot_be_written_are_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file in place of a folder")
    with pytest.raises(UserError, match="set another run.dir"):
        launch_local([], 1, tmp_path / "logs", command=program(""))


# ---- a rank dies


def test_a_killed_rank_takes_the_run_down(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    body = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_for_ranks(4)
        print("last words")
        if rank == 2: os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)
    """
    started = time.monotonic()
    status = launch_local([str(tmp_path)], 4, tmp_path / "logs", command=program(body))
    assert time.monotonic() - started < DEADLINE
    assert status == 128 + signal.SIGKILL
    assert f"rank 2 on {socket.gethostname()} was killed by signal SIGKILL" in capfd.readouterr().err
    assert (tmp_path / "logs/rank_2.log").read_text() == "last words\n"
    assert not any(map(is_alive, pids(tmp_path, 4)))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_raises_is_shown_and_not_those_that_died_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], failing: int
) -> None:
    body = f"""
        wait_for_ranks(3)
        if rank == {failing}: raise RuntimeError("the cause")
        while Path(f"/proc/{{(here / 'rank{failing}.pid').read_text()}}").exists(): time.sleep(0.1)
        time.sleep(0.2)
        raise RuntimeError("lost a peer")
    """
    assert launch_local([str(tmp_path)], 3, tmp_path / "logs", command=program(body), failure_grace=5) == 1
    err = capfd.readouterr().err
    assert err.count("RuntimeError: the cause") == 1
    assert "Traceback (most recent call last)" in err
    assert "lost a peer" not in err
    assert err.splitlines()[-1].startswith(f"megalite: rank {failing} on {socket.gethostname()} ended with status 1")
    assert "lost a peer" in (tmp_path / f"logs/rank_{1 - failing}.log").read_text(), "the others had no grace"


def test_only_this_runs_part_of_a_log_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in ("the first failure", "the second failure"):
        body = f"""
            if rank == 1: raise RuntimeError("{words}")
        """
        assert launch_local([str(tmp_path)], 2, tmp_path / "logs", command=program(body)) == 1
    err = capfd.readouterr().err
    assert err.count("RuntimeError: the first failure") == err.count("RuntimeError: the second failure") == 1


@pytest.mark.parametrize("finding", ["every rank", "rank 1 alone"])
def test_a_users_error_is_said_once_and_keeps_its_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], finding: str
) -> None:
    body = f"""
        wait_for_ranks(3)
        if {finding == "rank 1 alone"} and rank != 1: time.sleep(100)
        time.sleep(0.5 * (rank == 0))
        print("some warning", file=sys.stderr)
        print("megalite: error: run.yaml: one\\nmegalite: error: run.yaml: two", file=sys.stderr)
        sys.exit(2)
    """
    assert launch_local([str(tmp_path)], 3, tmp_path / "logs", command=program(body), failure_grace=2) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line != "some warning"]
    assert lines == ["megalite: error: run.yaml: one", "megalite: error: run.yaml: two"]


def test_what_a_rank_started_ends_with_it(tmp_path: Path) -> None:
    body = """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        leave_pid(f"child{rank}", child.pid)
        while len(list(here.glob("*.pid"))) < 4: time.sleep(0.01)
        if rank == 1: os._exit(3)
        time.sleep(100)
    """
    assert launch_local([str(tmp_path)], 2, tmp_path / "logs", command=program(body), failure_grace=0.5) == 3
    assert_nobody_lives(pids(tmp_path, 4))


def test_what_a_rank_leaves_behind_ends_with_a_run_that_went_well(tmp_path: Path) -> None:
    body = """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        leave_pid(f"child{rank}", child.pid)
    """
    assert launch_local([str(tmp_path)], 1, tmp_path / "logs", command=program(body)) == 0
    assert_nobody_lives(pids(tmp_path, 2))


# ---- the launcher dies, or is told to stop


@pytest.mark.parametrize(
    "body",
    [
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)",
        "import ctypes; ctypes.PyDLL(None).sleep(100)",
    ],
    ids=["deaf to SIGTERM", "never gives up the interpreter's lock"],
)
def test_a_killed_launcher_leaves_nobody(tmp_path: Path, started: list[subprocess.Popen[str]], body: str) -> None:
    launcher = start_launcher(started, tmp_path, 3, body)
    ranks = pids(tmp_path, 3)
    assert all(map(is_alive, ranks))
    launcher.kill()
    assert_nobody_lives(ranks, seconds=5)


def test_a_rank_that_starts_after_its_launcher_has_died_ends(tmp_path: Path) -> None:
    nobody = subprocess.Popen([sys.executable, "-c", ""])
    nobody.wait()
    variables = os.environ | {"RANK": "0", LAUNCHER_PID: str(nobody.pid)}
    orphan = subprocess.run([*program("time.sleep(100)"), str(tmp_path)], env=variables, timeout=DEADLINE, check=False)
    assert orphan.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_stop_signal_goes_on_to_the_ranks(
    tmp_path: Path, started: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    body = f"""
        signal.signal({number}, lambda *_: ((here / f"stopped{{rank}}").touch(), sys.exit(0)))
        leave_pid(f"ready{{rank}}", os.getpid())
        time.sleep(100)
    """
    launcher = start_launcher(started, tmp_path, 2, body)
    ranks = pids(tmp_path, 4)
    launcher.send_signal(number)
    assert launcher.wait(DEADLINE) == 0
    assert [(tmp_path / f"stopped{rank}").exists() for rank in (0, 1)] == [True, True]
    assert not any(map(is_alive, ranks))


DEAF = """
    for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
    leave_pid(f"ready{rank}", os.getpid())
    time.sleep(100)
"""


def test_ranks_that_do_not_stop_are_killed(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    launcher = start_launcher(started, tmp_path, 2, DEAF, "stop_grace=0.5")
    ranks = pids(tmp_path, 4)
    launcher.terminate()
    _, err = launcher.communicate(timeout=DEADLINE)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "stopped by signal SIGTERM" in err
    assert not any(map(is_alive, ranks))


def test_a_second_stop_signal_kills_at_once(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    launcher = start_launcher(started, tmp_path, 2, DEAF, "stop_grace=100")
    ranks = pids(tmp_path, 4)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert all(map(is_alive, ranks))
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(5) == 128 + signal.SIGINT
    assert not any(map(is_alive, ranks))


def test_ranks_that_save_have_the_time_they_need(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    body = f"""
        def stop(number, frame):
            time.sleep(1 + rank)
            os._exit({STOPPED_STATUS})
        signal.signal(signal.SIGTERM, stop)
        leave_pid(f"ready{{rank}}", os.getpid())
        time.sleep(100)
    """
    launcher = start_launcher(started, tmp_path, 2, body, "stop_grace=float('inf'), failure_grace=0.1, max_restarts=1")
    pids(tmp_path, 4)
    launcher.terminate()
    _, err = launcher.communicate(timeout=DEADLINE)
    assert launcher.returncode == STOPPED_STATUS
    assert err.startswith("megalite: asked to stop; ")
    assert len(err.splitlines()) == 1


def test_a_rank_that_dies_while_the_others_stop_does_not_hold_them_up(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    body = """
        if rank == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)
        leave_pid(f"ready{rank}", os.getpid())
        time.sleep(100)
    """
    launcher = start_launcher(started, tmp_path, 2, body, "stop_grace=float('inf'), failure_grace=0.5")
    pids(tmp_path, 4)
    launcher.terminate()
    assert launcher.wait(5) == 128 + signal.SIGTERM


def test_ranks_that_stopped_by_themselves_are_no_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = f"""
        wait_for_ranks(2)
        time.sleep(rank)
        sys.exit({STOPPED_STATUS})
    """
    status = launch_local([str(tmp_path)], 2, tmp_path / "logs", command=program(body), failure_grace=0.1)
    assert (status, capfd.readouterr().err) == (STOPPED_STATUS, "")


# ---- the ranks are started again

COUNTS_STARTS = """
with (here / f"starts{rank}").open("a") as starts: starts.write(os.environ["MEGALITE_RESTART_COUNT"])
"""


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_ranks_are_started_again_so_many_times(tmp_path: Path, capfd: pytest.CaptureFixture[str], allowed: int) -> None:
    body = f"""{COUNTS_STARTS}
if rank == 1 and os.environ["MEGALITE_RESTART_COUNT"] < "2": os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100 * (os.environ["MEGALITE_RESTART_COUNT"] < "2"))
"""
    status = launch_local(
        [str(tmp_path)], 2, tmp_path / "logs", command=program(body), failure_grace=0.1, max_restarts=allowed
    )
    assert status == (0 if allowed == 2 else 128 + signal.SIGKILL)
    assert (tmp_path / "starts1").read_text() == "012"[: allowed + 1]
    err = capfd.readouterr().err
    assert err.count("was killed by signal SIGKILL") == min(2, allowed + 1)
    assert [line for line in err.splitlines() if "started again" in line] == [
        f"megalite: all ranks are started again, time {count} of {allowed}" for count in range(1, allowed + 1)
    ]


@pytest.mark.parametrize("ending", ["2", str(STOPPED_STATUS), "3 if rank else 75"])
def test_a_users_mistake_and_a_stop_are_not_tried_again(tmp_path: Path, ending: str) -> None:
    body = f"{COUNTS_STARTS}\nos._exit({ending})"
    launch_local([str(tmp_path)], 2, tmp_path / "logs", command=program(body), max_restarts=3)
    assert (tmp_path / "starts1").read_text() == "0"


def test_a_run_that_was_told_to_stop_is_not_started_again(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    body = f"""{COUNTS_STARTS}
signal.signal(signal.SIGTERM, signal.SIG_IGN)
leave_pid(f"ready{{rank}}", os.getpid())
if rank == 1: os._exit(3)
time.sleep(100)
"""
    launcher = start_launcher(started, tmp_path, 2, body, "max_restarts=3")
    pids(tmp_path, 4)
    wait_until(lambda: not is_alive(int((tmp_path / "rank1.pid").read_text())))
    time.sleep(0.3)
    launcher.terminate()
    assert launcher.wait(5) == 3
    assert (tmp_path / "starts0").read_text() == "0"


def test_nohup_is_heeded(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        body = """
            while not (here / "go").exists(): time.sleep(0.02)
        """
        launcher = start_launcher(started, tmp_path, 1, body)
    finally:
        signal.signal(signal.SIGHUP, before)
    pids(tmp_path, 1)
    launcher.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    (tmp_path / "go").touch()
    assert launcher.wait(DEADLINE) == 0


def test_the_callers_signal_handlers_come_back(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    assert launch_local([str(tmp_path)], 1, tmp_path / "logs", command=program("")) == 0
    assert [signal.getsignal(number) for number in numbers] == before


# ---- deepspeed's two processes


@pytest.fixture
def deepspeed_run(tmp_path: Path, started: list[subprocess.Popen[str]]) -> dict[str, int]:
    """A shell, deepspeed's runner, its launch.py and one rank, each the child of the one before; their ids by name."""
    start_next = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL).returncode)\n"
    (tmp_path / "deepspeed").write_text(start_next)
    package = tmp_path / "modules/deepspeed/launcher"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "launch.py").write_text(start_next)
    rank = [*program("time.sleep(100)"), str(tmp_path)]
    launch = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", *rank]
    runner = [sys.executable, str(tmp_path / "deepspeed"), *launch]
    paths = os.pathsep.join([str(tmp_path / "modules"), *sys.path])
    variables = os.environ | {"RANK": "0", "CROSS_RANK": "0", "PYTHONPATH": paths}
    variables.pop(LAUNCHER_PID, None)
    shell = subprocess.Popen([sys.executable, "-c", start_next, *runner], env=variables, text=True)
    started.append(shell)
    (rank_pid,) = pids(tmp_path, 1)
    launch_py = psutil.Process(rank_pid).ppid()
    found = {"rank": rank_pid, "launch.py": launch_py, "runner": psutil.Process(launch_py).ppid(), "shell": shell.pid}
    for name, pid in found.items():
        (tmp_path / f"{name}.pid").write_text(str(pid))
    assert psutil.Process(found["runner"]).ppid() == shell.pid
    time.sleep(0.2)  # the rank has left its id before it looks up
    return found


@pytest.mark.parametrize("victim", ["launch.py", "runner"])
def test_a_rank_dies_with_either_of_deepspeeds_processes(deepspeed_run: dict[str, int], victim: str) -> None:
    os.kill(deepspeed_run[victim], signal.SIGKILL)
    assert_nobody_lives([deepspeed_run["rank"]], seconds=10)


def test_a_launcher_that_nobody_waits_for_is_dead_all_the_same(deepspeed_run: dict[str, int]) -> None:
    os.kill(deepspeed_run["shell"], signal.SIGSTOP)
    os.kill(deepspeed_run["runner"], signal.SIGKILL)
    wait_until(lambda: psutil.Process(deepspeed_run["runner"]).status() == psutil.STATUS_ZOMBIE)
    assert_nobody_lives([deepspeed_run["rank"]], seconds=10)


def test_a_rank_outlives_the_shell_above_deepspeed(deepspeed_run: dict[str, int]) -> None:
    os.kill(deepspeed_run["shell"], signal.SIGKILL)
    time.sleep(2.5)
    assert is_alive(deepspeed_run["rank"])


# ---- the logs of ranks that others launch


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stdout", [False, True])
def test_a_rank_keeps_a_log_beside_its_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stdout: bool
) -> None:
    path = tmp_path / "logs/rank_3.log"
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    for number in (1, 2):  # a second start adds to it
        with monkeypatch.context() as start:
            start.setattr(sys, "stdout", sys.stdout)
            start.setattr(sys, "stderr", sys.stderr)
            tee_to_log(path, rank=3, stdout=stdout)
            sys.stdout.write(f"out {number}\n")
            sys.stderr.write(f"err {number}\n")
            sys.stderr.writelines(["more\n"])
            sys.stdout.flush()
            sys.stderr.flush()
            assert sys.stderr.encoding
    told = capsys.readouterr()
    assert told.out == "out 1\nout 2\n"
    assert told.err == "err 1\nmore\nerr 2\nmore\n"
    lines = path.read_text().splitlines()
    assert [line for line in lines if not line.startswith("--- ")] == [
        *(["out 1"] if stdout else []),
        *("err 1", "more"),
        *(["out 2"] if stdout else []),
        *("err 2", "more"),
    ]
    heads = [line for line in lines if line.startswith("--- ")]
    assert len(heads) == 2
    assert f": rank 3 on {socket.gethostname()}, process {os.getpid()}" in heads[0]


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    (tmp_path / "logs").touch()
    tee_to_log(tmp_path / "logs/rank_0.log", rank=0, stdout=False)
    assert "megalite: warning: " in (told := capsys.readouterr().err)
    assert "rank_0.log: " in told
    tee_to_log(tmp_path / "rank_0.log", rank=0, stdout=False)
    sys.stderr._log = Broken()  # pyright: ignore[reportAttributeAccessIssue]
    for line in ("one\n", "two\n"):
        sys.stderr.write(line)
    told = capsys.readouterr().err
    one, lost, two = told.splitlines()
    assert (one, two) == ("one", "two")
    assert lost.startswith("megalite: ")
    assert lost.endswith(": No space left on device")
