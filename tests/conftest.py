"""What tests share: which tier they are of, a token index of made-up text, and run files over it."""

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import settings
from processes import is_alive
from training import QUICKSTART_MODEL

from megalite.data.indexed.writer import IndexedDatasetWriter

settings.register_profile("quick", max_examples=10)

IMPORTS = (ast.Import, ast.ImportFrom)
STARTS_PROCESSES = frozenset({"run_distributed", "subprocess", "multiprocessing", "psutil", "warm", "launch_local"})
"""A test module that knows any of these names starts processes, and is not of the tier `unit`."""


@pytest.hookimpl(tryfirst=True)
def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out, where the tier `unit` alone is asked for, the modules without any: they are slow to import."""
    if config.option.markexpr != "unit" or not collection_path.match("test_*.py"):
        return None
    imports = [node for node in ast.parse(collection_path.read_bytes()).body if isinstance(node, IMPORTS)]
    names = {name.asname or name.name.partition(".")[0] for node in imports for name in node.names}
    return True if names & STARTS_PROCESSES else None


_unit: list[str] = []
"""The test of the tier `unit` that runs now."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark the tests of modules that start no process."""
    for item in items:
        names = vars(item.module) if isinstance(item, pytest.Function) else STARTS_PROCESSES
        if not STARTS_PROCESSES.intersection(names) and not any(
            map(item.get_closest_marker, ("processes", "slow", "full"))
        ):
            item.add_marker(pytest.mark.unit)


def _refuse_processes(event: str, _: object) -> None:
    if _unit and event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        raise AssertionError(f"{_unit[0]} starts a process: mark it or its module `processes`")


sys.addaudithook(_refuse_processes)


@pytest.fixture(autouse=True)
def _a_unit_test_starts_no_process(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("unit"):
        _unit[:] = [request.node.nodeid]
    yield
    _unit.clear()


@pytest.fixture(scope="session", autouse=True)
def _signals_reach_what_tests_start() -> None:
    """A shell starts jobs in the background with SIGINT ignored, nohup with SIGHUP, and what is below inherits it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a token index with structure to learn: 400 documents over the quickstart model's vocabulary."""
    prefix = tmp_path_factory.mktemp("corpus") / "corpus"
    generator = np.random.default_rng(1)
    writer = IndexedDatasetWriter(prefix, np.dtype(np.uint16))
    for _ in range(400):
        length = int(generator.integers(20, 200))
        start, stride = generator.integers(0, 200, size=2)
        tokens = (start + stride * np.arange(length)) % 211 + 7 * generator.integers(0, 3, size=length)
        writer.add_document(tokens.astype(np.uint16))
    writer.finalize()
    return prefix


@pytest.fixture
def run_file(tmp_path: Path, corpus: Path) -> Path:
    """A run file for the quickstart's model on the made-up corpus, in fp32, small batches, clipping active."""
    content: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run"), "seed": 5},
        "model": QUICKSTART_MODEL,
        "data": {"sequence_length": 32, "train": [{"prefix": str(corpus)}]},
        "parallel": {"tensor": 1, "pipeline": 1, "data": 1, "engine": os.environ.get("MEGALITE_ENGINE", "auto")},
        "train": {
            "steps": 10,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "timeout_seconds": 60,
            # As the references of the tests, on every machine: what is compared rounds at the same places.
            "cpu_attention": "written_out",
            "optimizer": {"name": "adamw", "lr": 5.0e-4, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"name": "cosine", "warmup_steps": 3, "min_lr": 1.0e-4},
        },
        "deepspeed": {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a test has started itself: none of them, nor what left an id, outlives it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()
    for path in tmp_path.glob("*.pid"):
        pid = int(path.read_text())
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
