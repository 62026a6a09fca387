"""The harness itself: a test on ranks must tell which rank failed, why, and never hang or leave a process."""

import importlib.util
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from harness import RankError, run_distributed


@dataclass(frozen=True)
class Parcel:
    """A class of the test module's own, which the ranks must find."""

    number: int


def exchange(parcel: Parcel, offset: torch.Tensor) -> tuple[Parcel, torch.Tensor, list[str]]:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    variables = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]
    return Parcel(parcel.number + dist.get_rank()), total, [os.environ[name] for name in variables]


def test_results_come_in_the_order_of_ranks() -> None:
    results = run_distributed(exchange, 3, Parcel(10), torch.ones(2))
    assert [parcel for parcel, _, _ in results] == [Parcel(10), Parcel(11), Parcel(12)]
    assert all(torch.equal(total, torch.tensor([6.0, 6.0])) for _, total, _ in results)
    assert [variables for _, _, variables in results] == [[str(rank), "3", str(rank), "3", "1"] for rank in range(3)]


def join_by_variables() -> tuple[bool, bool, int]:
    before = dist.is_initialized()
    dist.init_process_group("gloo")
    ranks = torch.ones(1)
    dist.all_reduce(ranks)
    dist.destroy_process_group()
    return before, "deepspeed" in sys.modules, int(ranks)


def test_a_function_may_join_the_group_itself() -> None:
    assert run_distributed(join_by_variables, 2, init=False) == [(False, True, 2)] * 2


def big_result() -> torch.Tensor:
    return torch.arange(300_000)


def test_results_larger_than_a_pipe_arrive() -> None:
    assert all(torch.equal(result, torch.arange(300_000)) for result in run_distributed(big_result, 2))


def test_a_module_that_no_path_leads_to_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "far.py"
    file.write_text("class Parcel(int): pass\ndef double(parcel): return Parcel(2 * parcel)")
    spec = importlib.util.spec_from_file_location("nowhere.far", file)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "nowhere", ModuleType("nowhere"))
    monkeypatch.setitem(sys.modules, "nowhere.far", module)
    (result,) = run_distributed(module.double, 1, module.Parcel(3), init=False)
    assert (type(result), result) == (module.Parcel, 6)


def fail(how: str, folder: str) -> object:
    Path(folder, str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == 1:
        if how == "raises":
            raise ValueError("wrong by 3")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            os._exit(3)
        if how == "hangs":
            time.sleep(100)
        return lambda: "no process can send this"
    dist.barrier()
    return None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"^rank 1 of 3 raised:\n(.|\n)*in fail\n(.|\n)*ValueError: wrong by 3"),
        ("is killed", "^rank 1 of 3 was killed by signal SIGKILL"),
        ("exits", "^rank 1 of 3 ended with status 3 before the function returned"),
        ("returns what cannot be sent", r"^rank 1 of 3 raised:\n(.|\n)*lambda"),
    ],
)
def test_the_rank_that_failed_is_named_and_the_rest_are_ended(tmp_path: Path, how: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=message) as caught:
        run_distributed(fail, 3, how, str(tmp_path))
    assert caught.value.rank == 1
    assert time.monotonic() - started < 30
    assert_all_ended(tmp_path)


def test_ranks_that_hang_are_ended_in_time_and_say_where_they_were(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match="after 3 s these ranks had not returned") as caught:
        run_distributed(fail, 3, "hangs", str(tmp_path), timeout=3)
    assert time.monotonic() - started < 20
    stacks = str(caught.value).split("\nrank ")[1:]
    assert [stack.startswith(f"{rank} of 3:") for rank, stack in enumerate(stacks)] == [True, True, True]
    assert "in fail" in stacks[1]
    assert "in barrier" in stacks[0]
    assert_all_ended(tmp_path)


def assert_all_ended(folder: Path) -> None:
    pids = [int(path.read_text()) for path in folder.iterdir()]
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_function_that_no_rank_can_find_is_refused() -> None:
    with pytest.raises(TypeError, match="top level"):
        run_distributed(lambda: None, 2)
