"""A two-node Slurm for the tests of this folder, `minislurm.sh`: started once, gone with the tests however they end."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from two_nodes import MINISLURM, Cluster


@pytest.fixture(scope="session")
def served_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a Slurm of one's own takes root: its nodes are network namespaces")
    state, log = tmp_path_factory.mktemp("slurm"), tmp_path_factory.mktemp("minislurm") / "log"
    with log.open("wb") as errors:
        server = subprocess.Popen(
            [str(MINISLURM), "serve"],
            env={**os.environ, "MINISLURM": str(state)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        if server.stdout.readline() != b"ready\n":
            pytest.skip(f"no Slurm: {_last_words(log)} {_last_words(state / 'apt.log')}".strip())
        yield Cluster(state)
    finally:
        server.stdin.close()
        server.wait(30)
        server.stdout.close()


@pytest.fixture
def cluster(served_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, without a job before and after the test."""
    yield served_cluster
    served_cluster.call("scancel", "--user=root")
    deadline = time.monotonic() + 40
    while served_cluster.call("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.3)


def _last_words(file: Path) -> str:
    with suppress(OSError, IndexError):
        return file.read_text().splitlines()[-1]
    return ""
