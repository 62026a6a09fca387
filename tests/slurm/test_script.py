"""``megalite slurm``: its sizes and options, and what its script makes of a run's end, Slurm's commands replaced."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.cli import main
from megalite.slurm import LAUNCHERS, Job, render, tensor_over_nodes_warning

DONE, STOPPED_BY_HAND, STOPPED_BY_TIME = (
    'touch "$RUN/DONE.json"',
    """echo '{"step": 3, "reason": "STOP"}' >"$RUN/STOPPED.json" """,
    """echo '{"step": 3, "reason": "train.max_minutes"}' >"$RUN/STOPPED.json" """,
)
CHECKPOINT = 'mkdir -p "$RUN/checkpoints/step_2"'
USER_ERROR = 'echo "megalite: error: no such key" >>"$MEGALITE_USER_ERRORS"'

Rendered = Callable[..., tuple[int, str]]


@pytest.fixture
def rendered(run_file: Path, capsys: pytest.CaptureFixture[str]) -> Rendered:
    """The status of ``megalite slurm --dry-run`` and what it prints."""

    def call(*arguments: str) -> tuple[int, str]:
        status = main(["slurm", str(run_file), "--dry-run", *arguments])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_script_is_whole_and_bash_reads_it(rendered: Rendered, launcher: str) -> None:
    status, script = rendered("--nodes", "2", "--launcher", launcher, "parallel.tensor=2", "parallel.pipeline=2")
    assert status == 0
    assert "source " not in script
    assert {"nodes=2", "ntasks-per-node=2", "signal=B:USR1@300", "requeue", "job-name=run"} <= set(options(script))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_options_of_the_command_line_go_before_the_templates(rendered: Rendered) -> None:
    asked = ("--time", "1-00", "--stop-before", "60", "--account", "physics", "--partition", "long", "--name", "big")
    more = ("--gpus-per-node", "4", "--cpus-per-rank", "8", "--sbatch", "qos=high", "--sbatch", "--exclusive")
    _, script = rendered("--nodes", "1", *asked, *more, "parallel.data=auto", "train.global_batch_size=8")
    assert options(script) == [
        "job-name=big",
        "time=1-00",
        "signal=B:USR1@60",
        "requeue",
        "open-mode=append",
        "output=logs/%x/%j.log",
        "nodes=1",
        "ntasks-per-node=4",
        "cpus-per-task=8",
        "gpus-per-node=4",
        "account=physics",
        "partition=long",
        "qos=high",
        "exclusive",
    ]
    assert "no-requeue" in options(rendered("--nodes", "1", "--max-restarts", "0")[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--nodes", "3"),
            "tensor 2 x pipeline 2 x data 1 is 4 ranks, which --nodes 3 does not divide; use one of 1, 2, 4\n",
        ),
        (
            ("--nodes", "2", "--ranks-per-node", "4"),
            "is 8 ranks, but tensor 2 x pipeline 2 x data 1 in run.yaml is 4; ",
        ),
        (("--nodes", "2", "parallel.data=auto"), "; give --ranks-per-node, or parallel.data=1\n"),
        (
            ("--nodes", "1", "--ranks-per-node", "6", "parallel.data=auto"),
            "of the 4 of tensor 2 x pipeline 2 in run.yaml; use --nodes 2, or --ranks-per-node 8\n",
        ),
        (
            ("--nodes", "3", "--gpus-per-node", "2", "parallel.data=auto"),
            "--nodes 3 with --gpus-per-node 2 is 6 ranks, not a multiple of the 4 of tensor 2 x pipeline 2 in "
            "run.yaml; use --nodes 2, or --nodes 4\n",
        ),
        (
            ("--nodes", "1", "--gpus-per-node", "2", "--ranks-per-node", "1", "parallel.data=auto"),
            "--nodes 1 with --ranks-per-node 1 is 1 rank, not a multiple of the 4 of tensor 2 x pipeline 2 in "
            "run.yaml; use --nodes 4\n",
        ),
        (
            ("--nodes", "1", "--gpus-per-node", "4", "--ranks-per-node", "8", "parallel.data=2"),
            "--ranks-per-node 8 with --gpus-per-node 4: each rank takes a GPU of its own; use --ranks-per-node 4, or "
            "--gpus-per-node 8",
        ),
        (
            ("--nodes", "1", "--gpus-per-node", "4", "parallel.data=2"),
            "which --gpus-per-node gives 4; use --nodes 2\n",
        ),
        (
            ("--nodes", "3", "--gpus-per-node", "4", "parallel.data=2"),
            "is 8 ranks, which --nodes 3 does not divide; use one of 2, 4, 8\n",
        ),
        (
            ("--nodes", "1", "--gpus-per-node", "8"),
            "is 4 ranks on each of --nodes 1, fewer than --gpus-per-node 8; use --gpus-per-node 4, parallel.data=auto, "
            "or --ranks-per-node 4 to leave GPUs idle",
        ),
        (("--nodes", "2", "--launcher", "srum"), "--launcher 'srum' is no launcher; did you mean 'srun'?"),
        (("--nodes", "2", "resume=never"), "resume='never' would begin there again after every restart of the job; "),
        (
            ("--nodes", "2", "checkpoint.last=false"),
            "checkpoint.every=0 and checkpoint.last=false keep nothing ",
        ),
        (("--nodes", "2", "--container", "x", "--launcher", "deepspeed"), "; use --launcher srun or torchrun\n"),
        (("--nodes", "2", "--account", "a\n#SBATCH --wrap=x"), "; leave out blanks and quotes\n"),
        (("--nodes", "2", "--sbatch", "-N=3"), "is no long option of sbatch; write NAME=VALUE"),
        (
            ("--nodes", "2", "--sbatch", "job-name=x"),
            "--sbatch 'job-name=x': job-name is not given to sbatch as it stands",
        ),
        (("--nodes", "2", "--container", 'run "x'), "--container 'run \"x' is no command line: no closing quotation"),
        (("--nodes", "2", "--name", "../x"), "--name '../x' is to be a folder in logs/; write it without slashes"),
        (("--nodes", "2", "--time", "tomorrow"), "--time 'tomorrow' is none of sbatch's forms; write HH:MM:SS"),
        (("--nodes", "2", "--time", "1-2-3"), "--time '1-2-3' is none of sbatch's forms"),
        (
            ("--nodes", "2", "--time", "00:05:00"),
            "--time 00:05:00 is 300 s, and the run is asked to stop --stop-before",
        ),
        (("--nodes", "2", "--time", "5:00"), "--time 5:00 is 300 s"),
        (("--nodes", "2", "--time", "0-0:5"), "--time 0-0:5 is 300 s"),
        (("--nodes", "2", "--time", "4"), "--time 4 is 240 s"),
        (("--nodes", "2", "train.stepz=3"), "command line: train.stepz is not a key; did you mean 'train.steps'?"),
    ],
)
def test_what_cannot_be_is_said_with_its_fix(rendered: Rendered, arguments: tuple[str, ...], message: str) -> None:
    status, said = rendered(*arguments, "parallel.tensor=2", "parallel.pipeline=2")
    assert (status, said.startswith("megalite: error: ")) == (2, True)
    assert message in said


@pytest.mark.parametrize(
    ("arguments", "noted"),
    [
        ((), True),
        (("checkpoint.every=5",), False),
        (("checkpoint.every=5", "checkpoint.last=false"), False),
        (("--max-restarts", "0", "checkpoint.last=false"), False),
    ],
)
def test_a_job_that_saves_late_is_told_what_a_fault_costs(
    rendered: Rendered, arguments: tuple[str, ...], noted: bool
) -> None:
    status, said = rendered("--nodes", "2", *arguments, "parallel.tensor=2", "parallel.pipeline=2")
    assert (status, "note: checkpoint.every=0: only a stop" in said) == (0, noted)


def test_a_script_goes_into_a_file_or_the_reason_is_said(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for output, reason in ((tmp_path, "Is a directory"), (tmp_path / "none/x.sbatch", "No such file or directory")):
        assert main(["slurm", str(run_file), "--nodes", "1", "--output", str(output)]) == 2
        said = capsys.readouterr().err
        assert f"{output}: cannot be written: {output}: {reason}; give --output the path of a file" in said


def test_without_slurm_it_says_where_to_submit(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["slurm", str(run_file), "--nodes", "1"]) == 2
    assert "sbatch is not on this machine; submit from a login node, or give --output FILE" in capsys.readouterr().err
    assert main(["slurm", str(run_file), "--nodes", "1", "--output", "job.sbatch"]) == 0
    assert "srun --kill-on-bad-exit=1" in (tmp_path / "job.sbatch").read_text()
    said = capsys.readouterr().out
    assert said == "job.sbatch: written; submit it from this folder by: sbatch job.sbatch; log: run-JOB.log\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.sbatch", "run.yaml"], "and no folder for logs"


@pytest.mark.parametrize(
    ("folder", "log"), [("jobs", "jobs/%x-%j.log"), ("my jobs", "%x-%j.log"), ("j%d", "%x-%j.log")]
)
def test_a_script_in_a_folder_logs_beside_itself(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, log: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    assert main(["slurm", str(run_file), "--nodes", "1", "--output", f"{folder}/job.sbatch"]) == 0
    assert f"output={log}" in options((tmp_path / folder / "job.sbatch").read_text())


@pytest.mark.parametrize(
    ("tensor", "nodes", "per_node", "fits"),
    [
        (16, 4, 8, 8),
        (4, 2, 2, 2),
        (2, 2, 1, 1),
        (4, 2, 6, 2),
        (3, 2, 4, 1),
        (8, 4, 8, None),
        (4, 4, 8, None),
        (1, 4, 8, None),
        (16, 1, 16, None),
        (4, 1, 6, None),
    ],
)
def test_a_tensor_axis_over_nodes_is_warned_of(tensor: int, nodes: int, per_node: int, fits: int | None) -> None:
    warning = tensor_over_nodes_warning(tensor, per_node, nodes)
    assert (warning is None) == (fits is None)
    if warning is not None:
        assert warning.startswith(f"warning: parallel.tensor={tensor} does not divide the {per_node} rank")
        assert f"use parallel.tensor={fits} " in warning


def test_the_warning_is_no_part_of_the_script(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", str(run_file), "--dry-run", "--nodes", "2", "parallel.tensor=2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash\n")
    assert "warning: parallel" not in printed.out
    assert printed.err.startswith("warning: parallel.tensor=2 does not divide the 1 rank of a node: ")


@pytest.mark.parametrize(("nodes", "data"), [(8, 1), (16, 2)])
def test_70b_falls_on_nodes_of_8(nodes: int, data: int, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(__file__).parents[2] / "configs/llama_70b.yaml"
    given = [str(run), "--gpus-per-node", "8", "--dry-run", "deepspeed={zero_optimization: {stage: 1}}"]
    assert main(["slurm", *given, "--nodes", str(nodes)]) == 0
    assert f"nodes={nodes}" in options(capsys.readouterr().out)
    assert main(["slurm", *given, "--nodes", str(nodes - 4)]) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"--nodes {8 * data}")


class Bench:
    """A rendered job, run by bash among programs that stand for Slurm's: srun does what it is told in `does`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "runs" / "mine"
        self.requeued = folder / "requeued"
        self.program("srun", 'printf "%s\\n" "$@" >arguments; source ./does')
        self.program(
            "scontrol",
            'case "$*" in "show hostnames"*) printf "a1\\na2\\n" ;;\n'
            '*" show node "*) echo "NodeName=$4 NodeAddr=10.0.0.${4#a} State=IDLE" ;;\n'
            'requeue*) [ ! -e refuse ] || exit 1; echo "$2" >>requeued ;; esac',
        )
        self.program("squeue", "[ -e state ] && cat state || echo RUNNING")
        (folder / "run.yaml").write_text("run: {}\n")

    def program(self, name: str, does: str) -> None:
        (self.folder / "bin").mkdir(exist_ok=True)
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{does}\n")
        path.chmod(0o755)

    def start(self, does: str, *overrides: str, most: int = 20, **variables: str) -> subprocess.Popen[str]:
        (self.folder / "does").write_text(does)
        script = render(
            Job(
                launcher="srun",
                arguments=(str(self.run_dir), "run.yaml", *overrides),
                options={},
                path=str(self.folder / "bin"),
                max_restarts=most,
            )
        )
        (self.folder / "job.sbatch").write_text(script)
        slurm = {
            "SLURM_JOB_ID": "1203",
            "SLURM_JOB_NAME": "mine",
            "SLURM_JOB_NODELIST": "a[1-2]",
            "SLURM_TASKS_PER_NODE": "4(x2)",
        }
        return subprocess.Popen(
            ["bash", "job.sbatch"],
            cwd=self.folder,
            env={**os.environ, "RUN": str(self.run_dir), **slurm, **variables},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, does: str, *overrides: str, most: int = 20, **variables: str) -> tuple[int, str, bool]:
        """The job's status, its last line, and whether it was put back into the queue."""
        process = self.start(does, *overrides, most=most, **variables)
        said = process.communicate()[1]
        return process.returncode, said.splitlines()[-1], self.requeued.exists()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize(
    ("does", "status", "said", "requeued"),
    [
        (f"{DONE}; exit 1", 0, "the run is done", False),
        (f"{CHECKPOINT}; {USER_ERROR}; exit 1", 2, "with a user error", False),
        (f"{CHECKPOINT}; {STOPPED_BY_HAND}", 0, "was stopped by hand", False),
        (f"{CHECKPOINT}; {STOPPED_BY_TIME}", 0, "the job is requeued", True),
        (f"{CHECKPOINT}; exit 9", 9, "the job is requeued", True),
        (f"{CHECKPOINT}; exit 0", 0, "the job is requeued", True),
        (f"{CHECKPOINT}; echo '  stop_after: 2' >$RUN/config.yaml", 0, "ended at train.stop_after", False),
        ("exit 9", 9, "status 9 and has no checkpoint", False),
        ("exit 0", 1, "status 0 and has no checkpoint", False),
        (f"{CHECKPOINT}; echo CANCELLED >state; exit 9", 9, "since Slurm ended the job", False),
        (f"{CHECKPOINT}; touch refuse; exit 9", 9, "Slurm does not requeue the job", False),
    ],
)
def test_the_files_of_the_run_decide_what_becomes_of_the_job(
    bench: Bench, does: str, status: int, said: str, requeued: bool
) -> None:
    found = bench.run(does)
    assert (found[0], found[2]) == (status, requeued)
    assert said in found[1]


def test_a_folder_that_looks_like_a_pattern_has_its_checkpoints(bench: Bench) -> None:
    bench.run_dir = bench.folder / "runs" / "a[1] *"
    assert bench.run(f"{CHECKPOINT}; exit 9")[0::2] == (9, True)
    bench.run_dir = bench.folder / "runs" / "half"
    assert "has no checkpoint" in bench.run('mkdir -p "$RUN/checkpoints/step_2.tmp"; exit 9')[1]


def test_every_start_meets_at_another_port_and_knows_its_time(bench: Bench) -> None:
    bench.run('echo "$MASTER_PORT $MEGALITE_STARTED" >first; exit 9')
    bench.run('echo "$MASTER_PORT $MEGALITE_STARTED" >second; exit 9', SLURM_RESTART_COUNT="1")
    (port, began), (other, _) = ((bench.folder / name).read_text().split() for name in ("first", "second"))
    assert (port, other) == ("20030", "26040")
    assert 0 <= time.time() - float(began) < 60


def test_files_of_an_earlier_start_mean_nothing(bench: Bench) -> None:
    bench.run(f"{CHECKPOINT}; {DONE}; {STOPPED_BY_HAND}; {USER_ERROR}")
    assert bench.run("exit 9")[0::2] == (9, True)


def test_restarts_have_an_end(bench: Bench) -> None:
    assert bench.run(f"{CHECKPOINT}; exit 9", most=3, SLURM_RESTART_COUNT="3")[0::2] == (9, False)
    assert bench.run(f"{CHECKPOINT}; exit 9", most=3, SLURM_RESTART_COUNT="2")[0::2] == (9, True)


def test_a_signal_from_slurm_stops_the_run_by_a_file_and_waits_for_its_end(bench: Bench) -> None:
    wait = 'touch up; until [ -e "$RUN/STOP" ]; do sleep 0.02; done; sleep 0.2'
    does = f"{CHECKPOINT}; {wait}; {STOPPED_BY_HAND}; exit 7"
    process = bench.start(does)
    while not (bench.folder / "up").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    said = process.communicate()[1]
    assert (process.returncode, bench.requeued.exists()) == (7, True), said


def test_sizes_ports_and_arguments_reach_the_ranks(bench: Bench) -> None:
    hostile = "run.name='a b'; $(touch stolen) `touch stolen` \"$HOME\"\nline"
    bench.run('echo "$MASTER_ADDR $MASTER_PORT" >master', hostile, SLURM_CPUS_PER_TASK="3")
    assert (bench.folder / "master").read_text() == "10.0.0.1 20030\n"
    arguments = (bench.folder / "arguments").read_text()
    assert arguments.startswith("--kill-on-bad-exit=1\n--nodes=2\n--ntasks-per-node=4\n--cpus-per-task=3\npython\n-m\n")
    assert arguments.endswith(f"train\nrun.yaml\n{hostile}\nrun.dir={bench.run_dir}\n")
    assert not (bench.folder / "stolen").exists()
    assert sorted(path.name for path in (bench.folder / "logs/mine/1203").iterdir()) == [
        *("command", "job.sbatch", "run.yaml", "started")
    ]


def test_a_host_that_slurm_knows_by_name_is_looked_up_and_not_at_its_loopback(bench: Bench) -> None:
    bench.program(
        "scontrol", 'case "$*" in "show hostnames"*) printf "a1\\n" ;; *) echo "NodeAddr=$4 State=IDLE" ;; esac'
    )
    bench.program("getent", 'printf "127.0.1.1 STREAM a1\\n::1 STREAM a1\\n10.1.2.3 STREAM a1\\n"')
    bench.run('echo "$MASTER_ADDR" >master')
    assert (bench.folder / "master").read_text() == "10.1.2.3\n"


def test_nodes_of_different_sizes_are_refused(bench: Bench) -> None:
    status, said, _ = bench.run("exit 0", SLURM_TASKS_PER_NODE="4(x2),3")
    assert (status, "give --ntasks-per-node, the same for all" in said) == (2, True)


def test_the_folder_slurm_is_the_templates() -> None:
    repository = Path(__file__).parents[2]
    assert (repository / "slurm").resolve() == repository / "megalite" / "slurm" / "templates"


def test_a_rank_leaves_an_error_of_the_users_where_the_job_looks(tmp_path: Path) -> None:
    errors = tmp_path / "user_errors"
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20000"}
    rank = subprocess.run(
        [sys.executable, "-m", "megalite", "train", "missing.yaml"],
        cwd=tmp_path,
        env={**os.environ, **place, "MEGALITE_USER_ERRORS": str(errors)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert rank.returncode == 2
    assert errors.read_text() == rank.stderr
    assert rank.stderr.startswith("megalite: error: missing.yaml")


def test_a_signal_before_the_launcher_does_not_kill_the_job(bench: Bench) -> None:
    (bench.run_dir / "checkpoints/step_2").mkdir(parents=True)
    bench.program("ip", "touch up; sleep 1")
    process = bench.start("touch started_all_the_same")
    while not (bench.folder / "up").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    said = process.communicate()[1]
    assert (process.returncode, bench.requeued.exists()) == (0, True), said
    assert not (bench.folder / "started_all_the_same").exists()
