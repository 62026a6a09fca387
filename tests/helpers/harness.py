"""Run a function of a test on real ranks over gloo: `run_distributed(fn, world_size, *args)`.

Importing torch and deepspeed takes seconds. A server process imports them once, and every rank is forked from there
in milliseconds.
"""

import copyreg
import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, reduce
from itertools import accumulate
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

RANK_VARIABLES = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
GROUP_TIMEOUT = timedelta(seconds=60)


class RankError(Exception):
    """A rank raised, died or hung; the message has its number and its traceback."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, init: bool = True
) -> list[Any]:
    """Call ``fn(*args)`` on `world_size` ranks and return what each returned, in the order of ranks.

    `fn` is defined at the top level of a module; arguments and results are pickled, tensors by value. RANK,
    WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set; with `init` the default process
    group is formed over gloo before and left after.

    Raises RankError, naming the rank that failed first and with its traceback; after `timeout` seconds, with the stack
    of every rank that hangs. No rank is left when it returns or raises.
    """
    __tracebackhide__ = True
    # The ranks meet in a store of this process, on a port that the kernel picked: nobody can take it in between.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    call = _Call(
        module=fn.__module__,
        file=str(sys.modules[fn.__module__].__file__),
        name=_top_level_name(fn),
        arguments=bytes(_ByValue.dumps(args)),
    )
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[_Rank] = []
        try:
            for number in range(world_size):
                ranks.append(_start(_Place(number, world_size, store.port, folder, timeout, init), call))
            return _gather(ranks, timeout)
        finally:
            for rank in ranks:
                rank.kill()


@dataclass(frozen=True)
class _Call:
    """A call to make in another process. The file goes along: in pytest's importlib mode no path leads to a module."""

    module: str
    file: str
    name: str
    arguments: bytes

    def make(self) -> Any:
        fn: Any = reduce(getattr, self.name.split("."), self._load_module())
        return fn(*_unpickle(self.arguments))

    def _load_module(self) -> Any:
        if self.module not in sys.modules:
            self._load_packages()
            spec = importlib.util.spec_from_file_location(self.module, self.file)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[self.module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[self.module])
        return sys.modules[self.module]

    def _load_packages(self) -> None:
        """Load the packages around the module, which unpickling asks for; pytest invents those that do not exist."""
        *packages, _ = accumulate(self.module.split("."), "{}.{}".format)
        for package in packages:
            try:
                importlib.import_module(package)
            except ImportError:
                sys.modules[package] = ModuleType(package)


@dataclass(frozen=True)
class _Place:
    """Where a rank stands, and what it needs to get there."""

    rank: int
    world_size: int
    port: int
    folder: str
    timeout: float
    init: bool

    @property
    def stack_file(self) -> Path:
        return Path(self.folder, f"rank_{self.rank}")


@dataclass
class _Rank:
    """A rank as the test's process sees it."""

    place: _Place
    process: ForkServerProcess
    results: Connection

    def receive(self) -> "_Outcome":
        try:
            return _unpickle(self.results.recv_bytes())
        except EOFError:
            self.process.join(5)
            # Before any failure that was told: a rank that dies without a word does not die of its peers.
            return _Outcome(b"", self._epitaph(), time=0.0)

    def _epitaph(self) -> str:
        status = self.process.exitcode
        if status is not None and status < 0:
            return f"was killed by signal {signal.Signals(-status).name}"
        return f"ended with status {status} before the function returned"

    def stack(self) -> str:
        """Where every thread of this rank is now."""
        os.kill(self._pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self.place.stack_file.read_text()

    @property
    def _pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        if self.process.exitcode is None:
            # What the rank started has no other way to hear of it.
            with suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            self.process.kill()
        self.process.join()
        self.process.close()
        self.results.close()


@dataclass(frozen=True)
class _Outcome:
    """What a rank sends at its end: the pickled result, or how it failed, and when."""

    result: bytes
    failure: str | None
    time: float


class _ByValue(ForkingPickler):
    """Pickles tensors as they are: torch would pass shared memory, which ends with the rank that made it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dispatch_table = copyreg.dispatch_table


def _unpickle(data: bytes) -> Any:
    return ForkingPickler.loads(data)  # pyright: ignore[reportAttributeAccessIssue]


def _top_level_name(fn: Callable[..., Any]) -> str:
    if "<" in fn.__qualname__:
        raise TypeError(f"{fn.__qualname__} is not defined at the top level of its module, so no rank can find it")
    return fn.__qualname__


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    # Ranks inherit the environment of the server, not of the test.
    with patch.dict(os.environ, RANK_VARIABLES, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return context


def _start(place: _Place, call: _Call) -> _Rank:
    receiver, sender = _server().Pipe(duplex=False)
    process = _server().Process(target=_run_rank, args=(place, call, sender))
    process.start()
    sender.close()
    return _Rank(place, process, receiver)


def _gather(ranks: Sequence[_Rank], timeout: float) -> list[Any]:
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    waiting = list(ranks)
    outcomes: dict[int, _Outcome] = {}
    while waiting:
        ended = _receive(waiting, deadline)
        if not ended:
            _raise_hung(waiting, len(ranks), timeout)
        if any(outcome.failure for outcome in ended.values()):
            _raise_first_failure(ended, [rank for rank in waiting if rank.place.rank not in ended], len(ranks))
        outcomes |= ended
        waiting = [rank for rank in waiting if rank.place.rank not in ended]
    return [_unpickle(outcomes[rank.place.rank].result) for rank in ranks]


def _receive(ranks: Sequence[_Rank], deadline: float) -> dict[int, _Outcome]:
    ready = wait([rank.results for rank in ranks], max(0.0, deadline - time.monotonic()))
    return {rank.place.rank: rank.receive() for rank in ranks if rank.results in ready}


def _raise_first_failure(ended: dict[int, _Outcome], waiting: Sequence[_Rank], world_size: int) -> NoReturn:
    __tracebackhide__ = True
    # The peers of a failed rank may be heard of before it is.
    time.sleep(0.2)
    ended = ended | _receive(waiting, time.monotonic())
    failures = {rank: outcome for rank, outcome in ended.items() if outcome.failure}
    first = min(failures, key=lambda rank: failures[rank].time)
    raise RankError(first, f"rank {first} of {world_size} {failures[first].failure}")


def _raise_hung(ranks: Sequence[_Rank], world_size: int, timeout: float) -> NoReturn:
    __tracebackhide__ = True
    stacks = "".join(f"\nrank {rank.place.rank} of {world_size}:\n{rank.stack()}" for rank in ranks)
    raise RankError(ranks[0].place.rank, f"after {timeout:g} s these ranks had not returned:{stacks}")


def _run_rank(place: _Place, call: _Call, sender: Connection) -> None:
    os.setpgid(0, 0)
    _end_in_time(place.timeout)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.rank),
        LOCAL_WORLD_SIZE=str(place.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(place.port),
        # The store is that of the test's process: rank 0 must not open one.
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    with place.stack_file.open("w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
        sender.send_bytes(_ByValue.dumps(_make(call, place.init)))
        faulthandler.unregister(signal.SIGUSR1)


def _make(call: _Call, init: bool) -> _Outcome:
    try:
        if init:
            dist.init_process_group("gloo", timeout=GROUP_TIMEOUT)
        result = bytes(_ByValue.dumps(call.make()))
        if init:
            dist.destroy_process_group()
        return _Outcome(result, None, time.monotonic())
    except BaseException:
        return _Outcome(b"", f"raised:\n{traceback.format_exc()}", time.monotonic())


def _end_in_time(timeout: float) -> None:
    """See to it that this rank ends with the test's process, and soon after the time-out in any case."""
    signal.alarm(int(timeout) + 10)
    test_process = multiprocessing.parent_process()
    assert test_process is not None

    def end_with_test_process() -> None:
        test_process.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_test_process, daemon=True).start()
