"""Where the ranks meet before they form a group, and see that they are of one run.

All they need is torch's key-value store, which rank 0 opens or torchrun has opened: no rank can hang in a collective
with one of another layout or another number of ranks. Rank 0 writes its facts down, each other rank compares them with
its own and reports, and rank 0 tells all what came of it. A store may hold what the ranks of an earlier round have
left, after a restart by torchrun, say: every process and every round has a name of its own, drawn at random.
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
from megalite.launch.consistency import Facts, difference
from megalite.parallel.layout import name_ranks

GRACE_SECONDS = 2.0
"""How long rank 0 waits for more ranks once one has refused, and at the end for those that read why."""
QUIET_SECONDS = 30.0
"""How long rank 0 waits for ranks without a word, and then between two of them."""
NAME_SECONDS = 10.0
"""How long a name may lead nowhere: name servers have their moments."""
_TRY_SECONDS = 5.0
_POLL_SECONDS = 0.02
_MOST_POLL_SECONDS = 0.5
_ASK_SECONDS = 0.1
_LINES = 8


@dataclass(frozen=True, slots=True)
class Meeting:
    """What came of a meeting, the same on every rank.

    `store` is for those who met and for their process groups. `refusals` has a line for each rank that differs.
    """

    store: Store
    refusals: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()


def agree(environment: LaunchEnvironment, facts: Facts, timeout: datetime.timedelta) -> Store:
    """Meet the other ranks and return the store for their process groups.

    Raises CommonError on every rank where one has other facts than rank 0, RanksMissing where some have not come after
    `timeout`, and UserError where rank 0 cannot listen.
    """
    meeting = meet(environment, facts, timeout)
    if meeting.refusals:
        raise CommonError("\n".join(meeting.refusals))
    if meeting.missing:
        raise RanksMissing(missing_line(meeting.missing, environment, timeout))
    return meeting.store


def meet(environment: LaunchEnvironment, facts: Facts, timeout: datetime.timedelta) -> Meeting:
    """Meet the other ranks, and see who differs from rank 0 and who is missing.

    Raises RanksMissing where rank 0 cannot be reached, and UserError where it cannot listen.
    """
    store = _open_store(environment, timeout)
    try:
        if environment.rank == 0:
            return _Host(store, environment, timeout).receive(facts)
        return _report(store, environment, facts, timeout)
    except DistError as error:
        raise RanksMissing(
            f"rank 0 at {_place(environment)} does not answer rank {environment.rank} on {socket.gethostname()}; its "
            f"own messages say why ({str(error).splitlines()[0]})"
        ) from error


def missing_line(missing: Sequence[int], environment: LaunchEnvironment, timeout: datetime.timedelta) -> str:
    """Say which ranks have not come."""
    return (
        f"{name_ranks(missing)} of {environment.world_size} did not come to {_place(environment)} within "
        f"{timeout.total_seconds():g} s; see whether they were started, and their own messages"
    )


def exchange(store: Store, environment: LaunchEnvironment, name: str, value: Any) -> list[Any]:
    """Return what every rank passed, JSON, in the order of ranks, before there is a group. Collective; `name` is new.

    Raises RanksMissing where a rank does not take part within the store's timeout.
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
        raise RanksMissing(f"rank {waiting_for} ended or hung before the ranks' exchange of their {name}") from error


def ask_rank_zero(store: Store, environment: LaunchEnvironment, name: str, call: Callable[[], Any]) -> Any:
    """Call on rank 0 alone and return what that returned, JSON, on every rank, before there is a group; `name` is new.

    The other ranks wait as long as the call takes: it may read terabytes. Raises CommonError on every rank where the
    call raises UserError, and RanksMissing on the others where rank 0 fails in another way or ends.
    """
    key = f"{name}/answer"
    if environment.rank == 0:
        answer: dict[str, Any] = {"failed": True}
        try:
            answer = {"found": call()}
        except UserError as error:
            answer = {"refusal": str(error)}
        finally:
            store.set(key, json.dumps(answer))
            if "found" not in answer:
                _wait_for_readers(store, f"{name}/read", environment.world_size - 1)
    else:
        try:
            while not store.check([key]):
                time.sleep(_ASK_SECONDS)
            answer = json.loads(store.get(key))
            store.add(f"{name}/read", 1)
        except DistError as error:
            raise RanksMissing(f"rank 0 ended before it told the others of the {name}") from error
        if "failed" in answer:
            raise RanksMissing(f"rank 0 failed in the {name}; its own messages say why")
    if "refusal" in answer:
        raise CommonError(answer["refusal"])
    return answer["found"]


def _open_store(environment: LaunchEnvironment, timeout: datetime.timedelta) -> Store:
    """Connect to the store where the ranks meet, which rank 0 opens unless torchrun's agent has."""
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
    _find(environment, timeout, listens=not opens)
    try:
        return _within(timeout + datetime.timedelta(seconds=GRACE_SECONDS), connect)
    except TimeoutError as error:
        raise RanksMissing(
            f"rank {environment.rank} on {socket.gethostname()}: what listens at {_place(environment)} is not rank 0 "
            "of this run: it does not answer; another program may have the port, so set another MASTER_PORT, the same "
            "for every rank"
        ) from error
    except DistError as error:
        if opens and errno.errorcode[errno.EADDRINUSE] in str(error):
            raise UserError(
                f"MASTER_PORT={environment.master_port}: is taken on {socket.gethostname()} by another process; set "
                "another, the same for every rank"
            ) from error
        raise RanksMissing(
            f"rank {environment.rank} on {socket.gethostname()} cannot reach rank 0 at {_place(environment)} "
            f"({str(error).splitlines()[0]})"
        ) from error


def _find(environment: LaunchEnvironment, timeout: datetime.timedelta, *, listens: bool) -> None:
    """Wait until the master's name leads to an address and, where it `listens`, somebody takes connections there.

    torch would try as long, and fill the console with each of its tries.
    """
    host, began, pause = socket.gethostname(), time.monotonic(), _POLL_SECONDS
    while True:
        waited = time.monotonic() - began
        try:
            if not listens:
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
                    f"rank 0 at {_place(environment)} does not answer rank {environment.rank} on {host} within "
                    f"{timeout.total_seconds():g} s ({error.strerror or error}); see whether it was started, and its "
                    "own messages"
                ) from error
        time.sleep(pause)
        pause = min(1.5 * pause, _MOST_POLL_SECONDS)  # thousands of ranks may wait for a host that comes late


def _within(timeout: datetime.timedelta, connect: Callable[[], Store]) -> Store:
    """Call `connect` and return its store; TimeoutError after that time.

    torch's client waits without end for a server that takes its connection and says nothing.
    """
    store: Future[Store] = Future()

    def answer() -> None:
        try:
            store.set_result(connect())
        except BaseException as error:
            store.set_exception(error)

    threading.Thread(target=answer, daemon=True).start()
    return store.result(timeout.total_seconds())


class _Host:
    """Rank 0: it greets who comes, gathers their reports, and tells all of them what came of it."""

    def __init__(self, store: Store, environment: LaunchEnvironment, timeout: datetime.timedelta) -> None:
        self._store, self._environment, self._timeout = store, environment, timeout
        self._round = uuid.uuid4().hex
        self._greeted = self._heard = 0
        self._reports: dict[int, dict[str, Any]] = {}
        self._refusals: list[tuple[int, str]] = []

    def receive(self, facts: Facts) -> Meeting:
        me = _identity(self._environment.rank)
        self._store.set(f"{self._round}/facts", json.dumps({"facts": facts, **me}))
        began = time.monotonic()
        deadline, speaks_at = began + self._timeout.total_seconds(), began + QUIET_SECONDS
        while (missing := self._missing()) and time.monotonic() < deadline:
            self._greet()
            self._listen()
            if self._refusals:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > speaks_at:
                speaks_at += QUIET_SECONDS
                sys.stderr.write(f"megalite: waiting at {_place(self._environment)} for {name_ranks(missing)}\n")
            time.sleep(_POLL_SECONDS)
        return self._conclude(missing)

    def _missing(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(1, self._environment.world_size) if rank not in self._reports)

    def _greet(self) -> None:
        """Tell who has come the name of this round; one that an earlier round has left does not hear it."""
        names = _entries(self._store, "arrivals", self._greeted)
        for name in names:
            self._store.set(f"welcome/{name}", self._round)
        self._greeted += len(names)

    def _listen(self) -> None:
        reports = [json.loads(text) for text in _entries(self._store, f"{self._round}/reports", self._heard)]
        self._heard += len(reports)
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

    def _conclude(self, missing: tuple[int, ...]) -> Meeting:
        refusals = _shortened([line for _, line in sorted(self._refusals)])
        self._store.set(f"{self._round}/outcome", json.dumps({"refusals": refusals, "missing": missing}))
        if refusals or missing:
            _wait_for_readers(self._store, f"{self._round}/read", self._heard)
        return Meeting(PrefixStore(self._round, self._store), tuple(refusals), missing)


def _report(store: Store, environment: LaunchEnvironment, facts: Facts, timeout: datetime.timedelta) -> Meeting:
    """What every rank but 0 does."""
    me = uuid.uuid4().hex
    _append(store, "arrivals", me)
    name = store.get(f"welcome/{me}").decode()
    first = json.loads(store.get(f"{name}/facts"))
    refusal = difference(facts, first["facts"], first["host"])
    _append(store, f"{name}/reports", json.dumps({**_identity(environment.rank), "refusal": refusal}))
    # Rank 0 may have come later than this one, and waits as long from then.
    store.wait([f"{name}/outcome"], timeout + datetime.timedelta(seconds=GRACE_SECONDS))
    outcome = json.loads(store.get(f"{name}/outcome"))
    store.add(f"{name}/read", 1)
    return Meeting(PrefixStore(name, store), tuple(outcome["refusals"]), tuple(outcome["missing"]))


def _wait_for_readers(store: Store, counter: str, count: int) -> None:
    """On rank 0: the store may end with this process, so let the others read first."""
    deadline = time.monotonic() + GRACE_SECONDS
    while store.add(counter, 0) < count and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _identity(rank: int) -> dict[str, Any]:
    return {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}


def _append(store: Store, log: str, text: str) -> None:
    """Add an entry to a list in the store, to which all ranks may add at the same time."""
    store.set(f"{log}/{store.add(f'{log}/length', 1)}", text)


def _entries(store: Store, log: str, known: int) -> list[str]:
    """Return the entries of such a list behind those that are known, as far as they are complete."""
    found = []
    for number in range(known + 1, store.add(f"{log}/length", 0) + 1):
        if not store.check([f"{log}/{number}"]):
            break
        found.append(store.get(f"{log}/{number}").decode())
    return found


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _LINES
    return lines if more <= 0 else [*lines[:_LINES], f"{more} more ranks differ"]


def _place(environment: LaunchEnvironment) -> str:
    return f"{environment.master_address}:{environment.master_port}"
