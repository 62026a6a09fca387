"""Rendezvous of the ranks over torch's key-value store, with a consistency check, before any process group exists.

Rank 0 opens the store, unless torchrun's agent has. Rank 0 is the coordinator: it publishes its facts, every other rank
registers, compares them with its own facts and reports, and rank 0 publishes the outcome. Without a process group no
rank can hang in a collective with ranks of another layout or number. A store may still hold keys of an earlier round,
for example after a restart by torchrun: every process and every round therefore has a random name.
"""

import datetime
import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megalite.errors import CommonError, RanksMissing, UserError
from megalite.launch import LaunchEnvironment
from megalite.launch.consistency import Facts, first_difference
from megalite.parallel.layout import name_ranks

GRACE_SECONDS = 2.0
"""How long rank 0 waits for more ranks after the first refusal, and for the other ranks to read the outcome."""
QUIET_SECONDS = 30.0
"""How often rank 0 prints which ranks it waits for."""
NAME_SECONDS = 10.0
"""How long the lookup of the master's host name may fail: name servers fail at times."""
_TRY_SECONDS = 5.0
_POLL_SECONDS = 0.02
_MOST_POLL_SECONDS = 0.5
_ASK_SECONDS = 0.1
_LINES = 8


@dataclass(frozen=True, slots=True)
class RendezvousResult:
    """The outcome of a rendezvous, the same on every rank.

    `store` is for the ranks' process groups. `refusals` has a line for each rank whose facts differ from rank 0's;
    `missing` are the ranks that did not come in time.
    """

    store: Store
    refusals: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()


def rendezvous(environment: LaunchEnvironment, facts: Facts, timeout: datetime.timedelta) -> Store:
    """Wait for all ranks, compare their facts, and return the store for their process groups. Collective.

    Raises CommonError on every rank if the facts of some rank differ from those of rank 0, RanksMissing if some ranks
    have not come after `timeout`, and UserError if rank 0 cannot listen.
    """
    result = try_rendezvous(environment, facts, timeout)
    if result.refusals:
        raise CommonError("\n".join(result.refusals))
    if result.missing:
        raise RanksMissing(missing_ranks_message(result.missing, environment, timeout))
    return result.store


def try_rendezvous(environment: LaunchEnvironment, facts: Facts, timeout: datetime.timedelta) -> RendezvousResult:
    """Wait for the other ranks, and return which of them differ from rank 0 and which are missing. Collective.

    Raises RanksMissing if rank 0 cannot be reached, and UserError if it cannot listen.
    """
    store = _open_store(environment, timeout)
    try:
        if environment.rank == 0:
            return _Coordinator(store, environment, timeout).run(facts)
        return _register(store, environment, facts, timeout)
    except DistError as error:
        raise RanksMissing(
            f"rank 0 at {_address(environment)} does not answer rank {environment.rank} on {socket.gethostname()}; its "
            f"own messages say why ({str(error).splitlines()[0]})"
        ) from error


def missing_ranks_message(missing: Sequence[int], environment: LaunchEnvironment, timeout: datetime.timedelta) -> str:
    """Return a message that names the missing ranks, the rendezvous and the fix."""
    return (
        f"{name_ranks(missing)} of {environment.world_size} did not come to {_address(environment)} within "
        f"{timeout.total_seconds():g} s; check that they were started, and read their own messages"
    )


def all_gather_json(store: Store, environment: LaunchEnvironment, name: str, value: Any) -> list[Any]:
    """All-gather a JSON value per rank over the store; return the values in the order of the ranks. Collective.

    It needs no process group. `name` is part of the store's keys and must be new. Raises RanksMissing if a rank does
    not take part within the store's timeout.
    """
    rank = environment.rank
    store.set(f"{name}/{rank}", json.dumps(value))
    waiting_for = 0
    try:
        if rank == 0:
            values = []
            for waiting_for in range(environment.world_size):
                values.append(json.loads(store.get(f"{name}/{waiting_for}")))
            store.set(f"{name}/all", json.dumps(values))
            _wait_for_readers(store, f"{name}/read", environment.world_size - 1)
            return values
        everything = json.loads(store.get(f"{name}/all"))
        store.add(f"{name}/read", 1)
        return everything
    except DistError as error:
        raise RanksMissing(f"rank {waiting_for} ended or hung before the ranks exchanged their {name}") from error


def run_on_rank_zero(store: Store, environment: LaunchEnvironment, name: str, call: Callable[[], Any]) -> Any:
    """Call a function on rank 0 alone and broadcast its JSON result over the store to every rank. Collective.

    It needs no process group. `name` is part of the store's keys and must be new. The other ranks wait as long as the
    call takes: it may read terabytes. Raises CommonError on every rank if the call raises UserError, and RanksMissing
    on the other ranks if rank 0 fails in another way or ends.
    """
    key = f"{name}/answer"
    if environment.rank == 0:
        answer: dict[str, Any] = {"failed": True}
        try:
            answer = {"result": call()}
        except UserError as error:
            answer = {"refusal": str(error)}
        finally:
            store.set(key, json.dumps(answer))
            if "result" not in answer:
                _wait_for_readers(store, f"{name}/read", environment.world_size - 1)
    else:
        try:
            while not store.check([key]):
                time.sleep(_ASK_SECONDS)
            answer = json.loads(store.get(key))
            store.add(f"{name}/read", 1)
        except DistError as error:
            raise RanksMissing(f"rank 0 ended before it sent the result of the {name}") from error
        if "failed" in answer:
            raise RanksMissing(f"rank 0 failed in the {name}; its own messages say why")
    if "refusal" in answer:
        raise CommonError(answer["refusal"])
    return answer["result"]


def _open_store(environment: LaunchEnvironment, timeout: datetime.timedelta) -> Store:
    """Connect to the rendezvous store, which rank 0 opens unless torchrun's agent has opened it."""
    opens = environment.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    assert environment.master_address is not None
    assert environment.master_port is not None
    connect = partial(
        TCPStore,
        environment.master_address,
        environment.master_port,
        is_master=opens,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    _wait_for_master(environment, timeout, must_listen=not opens)
    try:
        return _connect_within(timeout + datetime.timedelta(seconds=GRACE_SECONDS), connect)
    except TimeoutError as error:
        raise RanksMissing(
            f"rank {environment.rank} on {socket.gethostname()}: the program that listens at {_address(environment)} "
            "is not rank 0 of this run: it does not answer; another program may use the port: set another MASTER_PORT, "
            "the same for every rank"
        ) from error
    except DistError as error:
        if opens and errno.errorcode[errno.EADDRINUSE] in str(error):
            raise UserError(
                f"MASTER_PORT={environment.master_port}: is taken on {socket.gethostname()} by another process; set "
                "another port, the same for every rank"
            ) from error
        raise RanksMissing(
            f"rank {environment.rank} on {socket.gethostname()} cannot reach rank 0 at {_address(environment)} "
            f"({str(error).splitlines()[0]})"
        ) from error


def _wait_for_master(environment: LaunchEnvironment, timeout: datetime.timedelta, *, must_listen: bool) -> None:
    """Wait until the master's host name resolves and, if it `must_listen`, its port accepts connections.

    torch's store would retry as long, but print every attempt to the console.
    """
    host, began, pause = socket.gethostname(), time.monotonic(), _POLL_SECONDS
    while True:
        waited = time.monotonic() - began
        try:
            if not must_listen:
                socket.getaddrinfo(environment.master_address, environment.master_port)
                return
            socket.create_connection((environment.master_address, environment.master_port or 0), _TRY_SECONDS).close()
            return
        except socket.gaierror as error:
            if waited > min(NAME_SECONDS, timeout.total_seconds()):
                raise UserError(
                    f"MASTER_ADDR={environment.master_address}: {host} knows no host of that name ({error.strerror}); "
                    "set the name or the address of rank 0's host, the same for every rank"
                ) from error
        except OSError as error:
            if waited > timeout.total_seconds():
                raise RanksMissing(
                    f"rank 0 at {_address(environment)} does not answer rank {environment.rank} on {host} within "
                    f"{timeout.total_seconds():g} s ({error.strerror or error}); check that it was started, and read "
                    "its own messages"
                ) from error
        time.sleep(pause)
        pause = min(1.5 * pause, _MOST_POLL_SECONDS)  # thousands of ranks may wait for a host that starts late


def _connect_within(timeout: datetime.timedelta, connect: Callable[[], Store]) -> Store:
    """Call `connect` in a thread and return its store; raise TimeoutError after `timeout`.

    torch's client waits forever for a server that accepts the connection but does not answer.
    """
    store: Future[Store] = Future()

    def run() -> None:
        try:
            store.set_result(connect())
        except BaseException as error:
            store.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return store.result(timeout.total_seconds())


class _Coordinator:
    """Rank 0's side of the rendezvous: admit registering ranks, collect their reports, publish the outcome."""

    def __init__(self, store: Store, environment: LaunchEnvironment, timeout: datetime.timedelta) -> None:
        self._store, self._environment, self._timeout = store, environment, timeout
        self._round = uuid.uuid4().hex
        self._num_admitted = self._num_reports = 0
        self._reports: dict[int, dict[str, Any]] = {}
        self._refusals: list[tuple[int, str]] = []

    def run(self, facts: Facts) -> RendezvousResult:
        me = _identity(self._environment.rank)
        self._store.set(f"{self._round}/facts", json.dumps({"facts": facts, **me}))
        began = time.monotonic()
        deadline, print_at = began + self._timeout.total_seconds(), began + QUIET_SECONDS
        while (missing := self._missing()) and time.monotonic() < deadline:
            self._admit()
            self._collect_reports()
            if self._refusals:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > print_at:
                print_at += QUIET_SECONDS
                sys.stderr.write(f"megalite: waiting at {_address(self._environment)} for {name_ranks(missing)}\n")
            time.sleep(_POLL_SECONDS)
        return self._conclude(missing)

    def _missing(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(1, self._environment.world_size) if rank not in self._reports)

    def _admit(self) -> None:
        """Send the name of this round to every newly registered process; those of an earlier round no longer read."""
        names = _entries(self._store, "registrations", self._num_admitted)
        for name in names:
            self._store.set(f"admitted/{name}", self._round)
        self._num_admitted += len(names)

    def _collect_reports(self) -> None:
        reports = [json.loads(text) for text in _entries(self._store, f"{self._round}/reports", self._num_reports)]
        self._num_reports += len(reports)
        for report in reports:
            rank = report["rank"]
            other = self._reports.setdefault(rank, report)
            if other is not report:
                twice = (
                    f"rank {rank} came twice: process {other['pid']} on {other['host']} and process {report['pid']} on "
                    f"{report['host']}; give each run a MASTER_PORT of its own"
                )
                self._refusals.append((rank, twice))
            if report["refusal"] is not None:
                self._refusals.append((rank, f"rank {rank} on {report['host']}: {report['refusal']}"))

    def _conclude(self, missing: tuple[int, ...]) -> RendezvousResult:
        refusals = _shortened([line for _, line in sorted(self._refusals)])
        self._store.set(f"{self._round}/outcome", json.dumps({"refusals": refusals, "missing": missing}))
        if refusals or missing:
            _wait_for_readers(self._store, f"{self._round}/read", self._num_reports)
        return RendezvousResult(PrefixStore(self._round, self._store), tuple(refusals), missing)


def _register(
    store: Store, environment: LaunchEnvironment, facts: Facts, timeout: datetime.timedelta
) -> RendezvousResult:
    """The other ranks' side of the rendezvous: register, compare the facts, report, read the outcome."""
    me = uuid.uuid4().hex
    _append(store, "registrations", me)
    name = store.get(f"admitted/{me}").decode()
    first = json.loads(store.get(f"{name}/facts"))
    refusal = first_difference(facts, first["facts"], first["host"])
    _append(store, f"{name}/reports", json.dumps({**_identity(environment.rank), "refusal": refusal}))
    # Rank 0 may have started later than this rank, and waits for `timeout` from its own start.
    store.wait([f"{name}/outcome"], timeout + datetime.timedelta(seconds=GRACE_SECONDS))
    outcome = json.loads(store.get(f"{name}/outcome"))
    store.add(f"{name}/read", 1)
    return RendezvousResult(PrefixStore(name, store), tuple(outcome["refusals"]), tuple(outcome["missing"]))


def _wait_for_readers(store: Store, counter: str, count: int) -> None:
    """On rank 0, which may host the store: give `count` other ranks time to read before this process ends."""
    deadline = time.monotonic() + GRACE_SECONDS
    while store.add(counter, 0) < count and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _identity(rank: int) -> dict[str, Any]:
    return {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}


def _append(store: Store, log: str, text: str) -> None:
    """Append an entry to a list in the store; all ranks may append at the same time."""
    store.set(f"{log}/{store.add(f'{log}/length', 1)}", text)


def _entries(store: Store, log: str, known: int) -> list[str]:
    """Return the entries of a list in the store after the first `known`, up to the first incomplete entry."""
    found = []
    for number in range(known + 1, store.add(f"{log}/length", 0) + 1):
        if not store.check([f"{log}/{number}"]):
            break
        found.append(store.get(f"{log}/{number}").decode())
    return found


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _LINES
    return lines if more <= 0 else [*lines[:_LINES], f"{more} more ranks differ"]


def _address(environment: LaunchEnvironment) -> str:
    return f"{environment.master_address}:{environment.master_port}"
