"""Jobs on a true two-node Slurm: each launcher trains as one machine does; a run outlives what happens to its job."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from two_nodes import ON_CPU, REPOSITORY, Cluster

from megalite.slurm import LAUNCHERS

pytestmark = pytest.mark.cluster

# Pipeline 2 across the nodes, tensor 2 within each.
LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2")
STEPS = ("train.steps=30", "checkpoint.every=2", "checkpoint.async=false")
SMALL = ("model.hidden_size=32", "model.intermediate_size=64", "model.vocab_size=256")


@dataclass(frozen=True)
class Submitted:
    """A job, and where its run leaves what it leaves."""

    number: str
    name: str
    run_dir: Path
    folder: Path

    def output(self) -> str:
        return (self.folder / "logs" / self.name / f"{self.number}.log").read_text(errors="replace")

    def losses(self) -> dict[int, float]:
        return read_losses(self.run_dir)

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while max(self.losses(), default=0) < step:
            assert time.monotonic() < deadline, f"no step {step}: {self.output()}"
            time.sleep(0.1)


Submit = Callable[..., Submitted]
Here = Callable[..., dict[int, float]]


def read_losses(run_dir: Path) -> dict[int, float]:
    """The loss of each step, the last word on it where it was run twice."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture
def submit(cluster: Cluster, run_file: Path, tmp_path: Path) -> Submit:
    """Submits a run of the small model by ``megalite slurm``."""

    def submit_run(name: str, launcher: str, *arguments: str, **variables: str) -> Submitted:
        run_dir = tmp_path / name
        command = [sys.executable, "-m", "megalite", "slurm", str(run_file), "--nodes", "2", "--launcher", launcher]
        said = cluster.call(*command, f"run.dir={run_dir}", *LAYOUT, *SMALL, *arguments, cwd=tmp_path, **variables)
        found = re.match(r"job (\d+): ", said)
        assert found, said
        return Submitted(found[1], name, run_dir, tmp_path)

    return submit_run


@pytest.fixture(scope="session")
def train_here(tmp_path_factory: pytest.TempPathFactory) -> Here:
    """The losses of a run that is not interrupted, on this machine and by hand; trained once for all tests."""
    known: dict[tuple[str, ...], dict[int, float]] = {}

    def losses(run_file: Path, *overrides: str) -> dict[int, float]:
        if overrides not in known:
            run_dir = tmp_path_factory.mktemp("here") / "run"
            command = [sys.executable, "-m", "megalite", "train", str(run_file), f"run.dir={run_dir}", *LAYOUT, *SMALL]
            environment = os.environ | ON_CPU
            done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            known[overrides] = read_losses(run_dir)
        return known[overrides]

    return losses


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "launcher", [name if name == "srun" else pytest.param(name, marks=pytest.mark.full) for name in LAUNCHERS]
)
def test_every_launcher_trains_as_one_machine_does(
    cluster: Cluster, submit: Submit, run_file: Path, train_here: Here, launcher: str
) -> None:
    short = ("train.steps=3", "checkpoint.every=0")
    job = submit("run", launcher, *short)
    ended = cluster.wait(job.number)
    assert (ended.state, ended.restarts) == ("COMPLETED", 0), job.output()
    assert (job.run_dir / "DONE.json").exists()
    assert job.losses() == train_here(run_file, *short)
    kept = job.folder / "logs" / job.name / job.number
    assert (kept / "run.yaml").read_bytes() == run_file.read_bytes()
    assert "train.steps=3" in (kept / "command").read_text()


def ranks_of(job: Submitted) -> dict[int, psutil.Process]:
    """The processes that train for a job, on all nodes, by their ranks."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            starts_megalite = "megalite" in (Path(word).name for word in words[1:4])  # a launcher names it later
            if starts_megalite and f"run.dir={job.run_dir}" in words:
                variables = process.environ()
                if (rank := variables.get("RANK", variables.get("SLURM_PROCID"))) is not None:
                    found[int(rank)] = process
    return found


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_costs_one_restart(
    cluster: Cluster, submit: Submit, run_file: Path, train_here: Here, launcher: str
) -> None:
    job = submit("killed", launcher, *STEPS)
    job.wait_for_step(3)
    ranks = ranks_of(job)
    assert sorted(ranks) == [0, 1, 2, 3]
    ranks[3].kill()
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=15)
    assert not alive, f"ranks live on: {alive}"
    ended = cluster.wait(job.number)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), job.output()
    assert job.losses() == train_here(run_file, *STEPS)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_stopped_rank_is_named_and_costs_one_restart(
    cluster: Cluster, submit: Submit, run_file: Path, train_here: Here, launcher: str
) -> None:
    job = submit("hung", launcher, *STEPS, "train.timeout_seconds=20")
    job.wait_for_step(3)
    ranks = ranks_of(job)
    ranks[2].suspend()
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=90)
    assert not alive, f"ranks live on: {alive}"
    ended = cluster.wait(job.number)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), job.output()
    assert "held up by rank 2 on node2" in job.output()
    assert job.losses() == train_here(run_file, *STEPS)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_requeued_job_goes_on(cluster: Cluster, submit: Submit, run_file: Path, train_here: Here) -> None:
    job = submit("requeued", "srun", *STEPS, "--container", "env MEGALITE_INSIDE=yes")
    job.wait_for_step(3)
    assert {rank.environ()["MEGALITE_INSIDE"] for rank in ranks_of(job).values()} == {"yes"}
    cluster.call("scontrol", "requeue", job.number)
    ended = cluster.wait(job.number)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), job.output()
    assert job.losses() == train_here(run_file, *STEPS)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_rank_that_outlives_its_job_does_not_hold_the_next_start_up(
    cluster: Cluster, submit: Submit, run_file: Path, train_here: Here
) -> None:
    """pdsh's ranks are out of Slurm's reach, and one that is stopped hears nothing: it has the port and the folder."""
    job = submit("left", "deepspeed", *STEPS)
    job.wait_for_step(3)
    stopped = ranks_of(job)[0]
    stopped.suspend()
    cluster.call("scontrol", "requeue", job.number)
    ended = cluster.wait(job.number)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), job.output()
    assert not stopped.is_running()
    assert job.losses() == train_here(run_file, *STEPS)
    assert not (job.folder / "logs" / job.name / job.number / ".deepspeed_env").exists()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_signal_while_the_ranks_start_is_heeded(
    cluster: Cluster, submit: Submit, run_file: Path, train_here: Here
) -> None:
    job = submit("early", "srun", *STEPS)
    cluster.wait_until(job.number, "RUNNING")
    while not ranks_of(job):
        time.sleep(0.1)
    cluster.call("scancel", "--signal=USR1", "--batch", job.number)
    ended = cluster.wait(job.number)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), job.output()
    assert "stopped after step 1 of 30, asked by STOP; checkpoint step_1" in job.output()
    assert job.losses() == train_here(run_file, *STEPS)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", ["node1", "node2"])
def test_a_run_goes_on_once_a_killed_node_is_back(
    cluster: Cluster,
    submit: Submit,
    run_file: Path,
    train_here: Here,
    victim: str,
) -> None:
    """The batch script runs on node1. On node2 it may notice before Slurm does, and the job start once more in vain."""
    job = submit("powerless", "srun", *STEPS)
    job.wait_for_step(3)
    cluster.kill_node(victim)
    cluster.wait_until(job.number, "PENDING")
    cluster.start_node(victim)
    ended = cluster.wait(job.number)
    assert ended.state == "COMPLETED", job.output()
    assert ended.restarts in ((1,) if victim == "node1" else (1, 2))
    assert job.losses() == train_here(run_file, *STEPS)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_signal_before_the_time_limit_saves_and_requeues(
    cluster: Cluster, submit: Submit, run_file: Path, train_here: Here, launcher: str
) -> None:
    job = submit("limited", launcher, *STEPS)
    job.wait_for_step(3)
    cluster.call("scancel", "--signal=USR1", "--batch", job.number)  # as Slurm does by itself
    ended = cluster.wait(job.number)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), job.output()
    assert "the job is requeued" in job.output()
    assert job.losses() == train_here(run_file, *STEPS)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_run_outlives_its_time_limit(cluster: Cluster, submit: Submit) -> None:
    job = submit("long", "srun", "train.steps=1000000", "checkpoint.every=1000", "--time=3", "--stop-before=30")
    job.wait_for_step(1)
    deadline = time.monotonic() + 300
    while not cluster.job(job.number).restarts:
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.5)
    stopped = max(job.losses())
    assert (job.run_dir / "checkpoints" / f"step_{stopped}").is_dir()
    job.wait_for_step(stopped + 1)
    (job.run_dir / "STOP").touch()
    ended = cluster.wait(job.number)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), job.output()
    assert "the run was stopped by hand" in job.output()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_jobs_share_nodes_and_the_end_of_one_leaves_the_other_alone(
    cluster: Cluster, submit: Submit, run_file: Path, train_here: Here
) -> None:
    """DeepSpeed kills by command line, on every node of the job."""
    odd = """a %h %% $HOME "b" 'c' `d` \\e"""
    stays = submit("stays", "deepspeed", *STEPS)
    goes = submit("goes", "deepspeed", "train.steps=1000000", *STEPS[1:], MEGALITE_ODD=odd)
    goes.wait_for_step(3)
    ranks = ranks_of(goes)
    assert sorted(ranks) == [0, 1, 2, 3]
    assert ranks[3].environ()["MEGALITE_ODD"] == odd
    cluster.call("scancel", goes.number)
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=60)
    assert not alive, f"ranks live on: {alive}"
    assert (cluster.wait(goes.number).state, cluster.job(goes.number).restarts) == ("CANCELLED", 0), goes.output()
    ended = cluster.wait(stays.number)
    assert (ended.state, ended.restarts) == ("COMPLETED", 0), stays.output()
    assert stays.losses() == train_here(run_file, *STEPS)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_error_of_the_users_is_not_tried_again(cluster: Cluster, submit: Submit, launcher: str) -> None:
    job = submit("wrong", launcher, "data.train=[{prefix: /nowhere/corpus}]")
    ended = cluster.wait(job.number)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "2", 0), job.output()
    assert "megalite: error: /nowhere/corpus" in job.output()
    assert "the run ended with a user error" in job.output()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_chain_of_jobs_by_the_template_itself(cluster: Cluster, run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "slurm").symlink_to(REPOSITORY / "slurm")
    command = [str(REPOSITORY / "slurm/chain.sh"), "2", "links", "--nodes=2", "--ntasks-per-node=1"]
    arguments = ["slurm/srun.sbatch", "runs/links", str(run_file), "parallel.pipeline=2", *SMALL, "checkpoint.every=1"]
    said = cluster.call(*command, *arguments, "train.steps=4", "train.stop_after=2", cwd=tmp_path)
    first, second = re.findall(r"Submitted batch job (\d+)", said)
    assert cluster.job(second).state == "PENDING"
    for number in (first, second):
        log = tmp_path / "logs/links" / f"{number}.log"
        assert cluster.wait(number).state == "COMPLETED", log.read_text()
        assert "the run ended at train.stop_after" in log.read_text()
    assert sorted(read_losses(tmp_path / "runs/links")) == [1, 2]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_an_array_preprocesses_as_one_command_does(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("slurm", "tools"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    texts = [tmp_path / f"text_{number}.jsonl" for number in range(5)]
    for number, text in enumerate(texts):
        lines = [
            json.dumps({"text": f"the quick brown fox {number} jumps over {line} lazy dogs"}) for line in range(40)
        ]
        text.write_text("\n".join(lines) + "\n")
    names = [text.name for text in texts]
    (tmp_path / "logs/preprocess").mkdir(parents=True)
    megalite = (sys.executable, "-m", "megalite")
    cluster.call(*megalite, "tokenizer", "train", *names, "--vocab-size=300", "--output=tok.model", cwd=tmp_path)
    whole = ("--tokenizer=tok.model", "--output=whole", "--append-eod", "--workers=1")
    cluster.call(*megalite, "preprocess", *names, *whole, cwd=tmp_path)
    script = ("slurm/preprocess_array.sbatch", "tok.model", "data/parts", *names)
    for array in ("0-2", "0-1"):  # the parts of the first, larger array are left, and are none of the second's
        cluster.call("sbatch", f"--array={array}", *script, cwd=tmp_path, PREPROCESS="--append-eod")
        deadline = time.monotonic() + 200
        while cluster.call("squeue", "--noheader"):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        logs = "".join(path.read_text() for path in (tmp_path / "logs/preprocess").iterdir())
        for suffix in (".bin", ".idx"):
            merged = tmp_path / f"data/parts{suffix}"
            assert merged.is_file(), logs
            assert merged.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes(), logs
            merged.unlink()
