"""Shards to worker processes, as many at a time as keep them busy; and an orderly end when one is asked for."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.data.preprocess.encode_shard import (
    Coder,
    MalformedDocument,
    Recipe,
    ShardFiles,
    ShardReport,
    encode_shard,
)
from megalite.data.preprocess.inputs import Segment
from megalite.data.tokenizers.load import load_tokenizer
from megalite.errors import UserError

if TYPE_CHECKING:
    from megalite.data.chat.chat_template import ChatTemplate

_POLL_SECONDS = 0.1
_UNDER_WAY = 2
"""Shards a worker: the one it encodes, and the next."""


@dataclass(frozen=True, slots=True)
class CoderFiles:
    """Where a worker finds what it encodes with."""

    tokenizer: Path
    digest: str
    chat: str | None


@dataclass(frozen=True, slots=True)
class Task:
    """One shard to encode."""

    number: int
    shard: tuple[Segment, ...]
    source: str
    files: ShardFiles


Outcome = tuple[Task, ShardReport | MalformedDocument]


class Interrupted(KeyboardInterrupt):
    """The user, or the system, asked for an end (SIGINT, SIGTERM)."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number
        """The exit status that says so."""
        self.fix = ""
        """How to go on."""


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Note SIGINT and SIGTERM instead of ending at once; yields a function that raises Interrupted once one came.

    A second signal does what it does without us. Outside the main thread signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: list[int] = []
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, before[number] or signal.SIG_DFL)

    def check() -> None:
        if came:
            raise Interrupted(came[0])

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def encode_here(
    tasks: Iterable[Task], recipe: Recipe, coder: Coder, tell: Callable[[float, int], None]
) -> Generator[Outcome, None, None]:
    """Yield what became of each shard, encoded in this process one after the other."""
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        for task in tasks:
            try:
                yield task, encode_shard(task.shard, recipe, coder, task.files, task.source, tell)
            except MalformedDocument as error:
                yield task, error
    finally:
        if threads is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = threads


def encode_in_workers(
    tasks: Iterable[Task],
    recipe: Recipe,
    coder: Coder,
    coder_files: CoderFiles,
    workers: int,
    check: Callable[[], None],
    tell: Callable[[float, int], None],
) -> Generator[Outcome, None, None]:
    """Yield what became of each shard, in the order in which worker processes finish; `check` may raise.

    Raises UserError for what a worker could not read, and where one was killed.
    """
    context, inherited = _context(), None
    if context.get_start_method() == "fork":
        inherited = coder
    # Without a lock, which a worker that is killed might take along: each writes to places of its own.
    shared, slots = context.RawArray("d", 1 + 2 * workers), context.SimpleQueue()
    for slot in range(workers):
        slots.put(1 + 2 * slot)
    seen = [0.0, 0.0]

    def tell_new() -> None:
        now = [sum(shared[1::2]), sum(shared[2::2])]
        tell(now[0] - seen[0], round(now[1] - seen[1]))
        seen[:] = now

    start = (shared, slots, inherited)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=start)
    under_way: dict[Future[ShardReport], Task] = {}
    try:
        waiting = iter(tasks)
        more = True
        while more or under_way:
            while more and len(under_way) < _UNDER_WAY * workers:
                task = next(waiting, None)
                more = task is not None
                if task is not None:
                    under_way[pool.submit(_encode, task, recipe, coder_files)] = task
            done, _ = wait(under_way, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            tell_new()
            check()
            for future in done:
                task = under_way.pop(future)
                error = future.exception()
                if error is not None and not isinstance(error, MalformedDocument):
                    raise error
                yield task, error or future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"preprocess: a worker process was killed, most likely for want of memory; use fewer than --workers "
            f"{workers}"
        ) from error
    finally:
        shared[_STOP] = 1
        pool.shutdown(cancel_futures=True)


def _context() -> Any:
    """Return how processes are started: forked, which takes no time, or spawned where a fork might hang.

    It might where there are threads: one of them may hold a lock that nobody in the new process will ever release.
    """
    threads = Path("/proc/self/task")
    alone = threads.is_dir() and len(list(threads.iterdir())) == 1
    return multiprocessing.get_context("fork" if alone else "spawn")


_STOP = 0


class _Stopped(Exception):
    """The parent wants no more."""


def _encode(task: Task, recipe: Recipe, files: CoderFiles) -> ShardReport:
    shared, slot = _of_worker["shared"], _of_worker["slot"]
    coder = _of_worker["coder"] or _load_coder(files)

    def tell(disk_bytes: float, tokens: int) -> None:
        if shared[_STOP]:
            raise _Stopped
        shared[slot] += disk_bytes
        shared[slot + 1] += tokens

    return encode_shard(task.shard, recipe, coder, task.files, task.source, tell)


def chat_template(name: str | None) -> "ChatTemplate | None":
    """Return a chat template by its name or file."""
    if name is None:
        return None
    from megalite.data.chat.chat_template import load_chat_template

    return load_chat_template(name)


@cache
def _load_coder(files: CoderFiles) -> Coder:
    tokenizer = load_tokenizer(files.tokenizer)
    if tokenizer.digest != files.digest:
        raise UserError(
            f"{files.tokenizer}: changed while it was in use; leave the tokenizer alone until preprocess is done"
        )
    return Coder(tokenizer, chat_template(files.chat))


_of_worker: dict[str, Any] = {}
"""What a worker process is given when it starts."""


def _start_worker(shared: Any, slots: Any, coder: Coder | None) -> None:
    _of_worker.update(shared=shared, slot=slots.get(), coder=coder)
    # Control-C reaches every process of the terminal, a scheduler often signals all; the parent alone says how it ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # One process a core already: threads inside would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent says no goodbye, and its workers would wait for the next shard for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
