"""``megalite verify`` by the command line: its table, its words and its status, under every launcher."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import warm

Launcher = Callable[[int], list[str]]
SMALL = ("--scale", "model.vocab_size=256", "parallel.pipeline=2")

# What a site's own module at start-up can do to a process, a test can: the product has no hook to break it by.
BROKEN = """
from dataclasses import replace
import megalite.parallel.mesh as distributed

build = distributed.build_mesh
distributed.build_mesh = lambda *where, **how: replace(build(*where, **how), embedding=None)
"""
CRASHING = """
import os
import megalite.parallel.mesh as distributed

build = distributed.build_mesh

def fail(layout, rank, **how):
    if layout.size("pipeline") > 1 and rank == 1:
        raise RuntimeError("a rank that fails")
    return build(layout, rank, **how)

distributed.build_mesh = fail
"""


def by_torchrun(ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m", "megalite"]


def by_deepspeed(ranks: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    words = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", port]
    return [*words, "--module", "megalite"]


def verify(
    launcher: list[str], *words: str, scratch: Path, site: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the verb to its end; `site` is a module that every process imports as it starts."""
    scratch.mkdir(exist_ok=True)
    environment = os.environ | {
        **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)},
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    if site is not None:
        folder = scratch.with_name("site")
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(site)
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment["PYTHONPATH"]])
    command = [sys.executable, *launcher, "verify", *words]
    return warm.run(command, timeout=200, fresh=site is not None, env=environment)


def verdicts(done: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r", \d+ ranks?: (\w+)", done.stdout)


BY_HAND = ["-m", "megalite"]


@pytest.mark.parametrize(
    ("tensor", "layouts"),
    [(1, ["1x2x1"]), pytest.param(2, ["2x1x1", "1x2x1", "2x2x1"], marks=pytest.mark.full)],
)
def test_a_run_that_trains_like_one_process_is_verified(
    run_file: Path, tmp_path: Path, tensor: int, layouts: list[str]
) -> None:
    words = [str(run_file), *SMALL, f"parallel.tensor={tensor}"]
    done = verify(BY_HAND, *words, scratch=tmp_path / "scratch")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == (
        f"run.yaml: llama, tensor {tensor} x pipeline 2 x data 1, ZeRO-1, in fp32; 4 sequences x 32 tokens"
    )
    assert "--scale: model.head_dim=8, not 32" in lines
    assert verdicts(done) == ["agrees"] * len(layouts)
    header = next(number for number, line in enumerate(lines) if line.startswith("layout"))
    assert lines[header].split() == ["layout", "loss", "norm", "worst", "gradient", "weights", "verdict", "s"]
    assert [line.split()[0] for line in lines[header + 1 : -1]] == layouts
    assert lines[-1] == "verified: every layout trains as one process does"
    assert not (tmp_path / "run").exists(), "the run's own folder is left alone"
    assert list((tmp_path / "scratch").glob("megalite-verify-*")) == []


def test_a_broken_build_is_told_from_a_right_one(run_file: Path, tmp_path: Path) -> None:
    done = verify(BY_HAND, str(run_file), *SMALL, scratch=tmp_path / "scratch", site=BROKEN)
    assert (done.returncode, done.stderr) == (1, "")
    fault = next(line for line in done.stdout.splitlines() if line.startswith("  gradients"))
    assert fault.startswith("  gradients of embedding.tokens.weight on stage 1, rank 1 differ by ")
    assert "  what agrees: weights before the step, loss, the update by this layout's gradients" in done.stdout
    assert done.stdout.splitlines()[-1] == "not verified"


@pytest.mark.full
@pytest.mark.parametrize("launcher", [by_torchrun, by_deepspeed])
def test_the_ranks_of_a_launcher_verify_each_layout(run_file: Path, tmp_path: Path, launcher: Launcher) -> None:
    words = [str(run_file), "--scale", "model.vocab_size=256", "parallel.data=auto"]
    # The first layout takes one of the two ranks; the other goes ahead to the second.
    done = verify(launcher(2), *words, "--layouts=1x1x1,2x1x1", scratch=tmp_path / "scratch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(done) == ["agrees"] * 2
    assert done.stdout.count("verified: every layout trains as one process does") == 1
    assert list((tmp_path / "scratch").glob("megalite-verify-*")) == []


@pytest.mark.full
@pytest.mark.parametrize("launcher", [by_torchrun, by_deepspeed])
def test_a_broken_build_ends_a_launcher_with_an_error(run_file: Path, tmp_path: Path, launcher: Launcher) -> None:
    done = verify(launcher(2), str(run_file), *SMALL, scratch=tmp_path / "scratch", site=BROKEN)
    assert done.returncode != 0
    assert "gradients of embedding.tokens.weight on stage 1, rank 1 differ by " in done.stdout
    assert "not verified" in done.stdout


@pytest.mark.full
def test_a_layout_that_fails_is_no_reason_not_to_compare_the_next(run_file: Path, tmp_path: Path) -> None:
    words = [str(run_file), *SMALL, "--layouts=1x2x1,1x1x1"]
    done = verify(BY_HAND, *words, scratch=tmp_path / "scratch", site=CRASHING)
    assert done.returncode == 1
    assert verdicts(done) == ["failed", "agrees"]
    assert "RuntimeError: a rank that fails" in done.stderr
    assert "megalite: rank 1 ended with status 1; its log: " in done.stderr
    log = Path(done.stderr.rpartition("its log: ")[2].splitlines()[0])
    assert log.exists(), "what a message names is still there"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("parallel.tensor=3",), "parallel.tensor=3 does not divide model.num_attention_heads=8; use 1, 2, 4 or 8"),
        (("--layouts=2x2",), "--layouts: '2x2' is not a layout; write "),
        (("--scale", "init_from=nowhere"), "nowhere"),
        (("--layouts=1x1x3",), "does not divide train.global_batch_size=4"),
        (("data.train=[{prefix: /nowhere/corpus}]",), "/nowhere/corpus"),
        (
            ("parallel.data=4096", "train.global_batch_size=4096", "data.train=[{prefix: /nowhere/corpus}]"),
            "with --oversubscribe",
        ),
    ],
)
def test_mistakes_end_at_once_with_status_2(
    run_file: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    done = verify(BY_HAND, str(run_file), *words, scratch=tmp_path / "scratch")
    assert done.returncode == 2
    assert done.stderr.startswith("megalite: error: ")
    assert message in done.stderr
    assert " ranks: " not in done.stdout
