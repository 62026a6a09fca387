"""Local launcher: start the ranks of a run on this machine, supervise them, and end all of them when one dies."""

import codecs
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from megalite.errors import STOPPED_STATUS, USER_ERROR_STATUS, UserError
from megalite.launch.announce import clear_announcement_before_stderr
from megalite.launch.environment import LAUNCHER_PID, RESTART_COUNT, STARTED, start_time

USER_ERROR_PREFIX = "megalite: error: "
"""The prefix of a rank's lines that report a UserError; `launch_local` searches for it in a rank's log."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TAIL_BYTES = 65536
TAIL_LINES = 60


def launch_local(
    argv: Sequence[str],
    world_size: int,
    log_dir: Path,
    *,
    command: Sequence[str] = (sys.executable, "-m", "megalite"),
    failure_grace: float = 5.0,
    stop_grace: float = 10.0,
    max_restarts: int = 0,
    failed: Callable[[str], None] = lambda message: None,
) -> int:
    """Run `command` with `argv` as `world_size` ranks on this machine; return the exit status of the run.

    Rank 0 writes to the console, and its stderr to ``rank_0.log`` too; the other ranks write to ``rank_N.log`` in
    `log_dir`. Every rank is the leader of its own session, so that the processes that it started can be killed with it.

    When a rank fails, the others have `failure_grace` seconds to end by themselves before they are killed. The rank
    that failed first is named on stderr, with its traceback. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are forwarded to the
    ranks, which then have `stop_grace` seconds to end, without a limit if it is math.inf; a second signal kills them at
    once.

    After a failure all ranks are restarted, at most `max_restarts` times, unless the failure was a UserError or a
    signal was received. If the run fails for good, `failed` is called with a description of the failure.

    Returns 0 if every rank succeeded, `STOPPED_STATUS` if they stopped on request, the status of the rank that failed
    first, or 128 + N for signal N. Call it from the main thread; `command` must call `die_with_parent`. Raises
    UserError if `log_dir` cannot be created.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{log_dir}: the folder for the ranks' logs cannot be created: {error.strerror}; set another run.dir"
        ) from error
    with _Signals() as signals:
        for restarts in range(max_restarts + 1):
            supervisor = _Supervisor(signals, failure_grace, stop_grace)
            _run_ranks([*command, *argv], world_size, restarts, log_dir, supervisor)
            clear_announcement_before_stderr()
            status = supervisor.report()
            if not supervisor.may_restart or restarts == max_restarts:
                if supervisor.failure:
                    failed(supervisor.failure)
                return status
            sys.stderr.write(f"megalite: all ranks are started again, time {restarts + 1} of {max_restarts}\n")
    raise AssertionError(f"max_restarts={max_restarts} is below 0")


def _run_ranks(
    command: Sequence[str], world_size: int, restarts: int, log_dir: Path, supervisor: "_Supervisor"
) -> None:
    """Start the ranks and supervise them until all have ended."""
    ranks: list[_Rank] = []
    with reserved_port() as port, closing(_Console(log_dir / "rank_0.log")) as console:
        try:
            for number in range(world_size):
                variables = _variables(number, world_size, port) | {RESTART_COUNT: str(restarts)}
                ranks.append(_start_rank(number, command, variables, log_dir, console))
            console.close_write_end()
            supervisor.run(ranks, console)
        finally:
            for rank in ranks:
                rank.kill()


def _variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // world_size)),
        # Otherwise the last lines of a rank that is killed would be lost in its buffer.
        "PYTHONUNBUFFERED": "1",
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER_PID: str(os.getpid()),
        STARTED: str(start_time(os.environ)),
    }


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a free port, bound so that no other process gets it before rank 0 listens on it.

    On Linux two sockets with SO_REUSEADDR may share an address as long as at most one of them listens, and rank 0's
    store sets that option. On other systems the port is released before the body runs.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        port = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port


@dataclass(slots=True)
class _Rank:
    """A started rank, and the offset in its log at which this run begins."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int

    @property
    def status(self) -> int:
        """Exit status after the end; -N if signal N killed the rank."""
        return self.process.returncode

    def has_ended(self) -> bool:
        """Whether the rank has ended; if so, kills the processes that remain in its session."""
        if self.process.poll() is None:
            return False
        self._kill_session()
        return True

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the rank with all processes of its session and wait for its end; does nothing if it has ended."""
        if self.process.returncode is None:
            self._kill_session()
            self.process.wait()

    def _kill_session(self) -> None:
        # For a group without processes macOS returns EPERM, Linux ESRCH.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def describe_end(self) -> str:
        """Describe how the rank ended: ``rank 1 on HOST was killed by signal SIGKILL``."""
        who = f"rank {self.number} on {socket.gethostname()}"
        if self.status >= 0:
            return f"{who} ended with status {self.status}"
        try:
            name = signal.Signals(-self.status).name
        except ValueError:
            name = str(-self.status)
        hint = " (often a lack of memory)" if -self.status == signal.SIGKILL else ""
        return f"{who} was killed by signal {name}{hint}"

    def may_be_a_consequence(self) -> bool:
        """Whether the rank may have died because a peer died: NCCL aborts with SIGABRT, other signals are external."""
        return self.status >= 0 or -self.status == signal.SIGABRT

    def tail(self) -> list[str]:
        """Return the last lines that this run wrote to the rank's log."""
        with self.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self.log_start, end - TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()[-TAIL_LINES:]


def _start_rank(
    number: int, command: Sequence[str], variables: Mapping[str, str], log_dir: Path, console: "_Console"
) -> _Rank:
    path = log_dir / f"rank_{number}.log"
    with path.open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log if number else None,
            stderr=subprocess.STDOUT if number else console.write_end,
            start_new_session=True,
        )
    return _Rank(number, process, path, log_start)


class _Console:
    """A pipe for rank 0's stderr, copied to the console and to its log."""

    def __init__(self, log: Path) -> None:
        self._log: BinaryIO | None = log.open("ab", buffering=0)
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self.read_end, self.write_end = os.pipe()
        self.muted = False

    def pump(self) -> bool:
        """Copy the available bytes, waiting for some; return False at the end of the pipe."""
        chunk = os.read(self.read_end, 1 << 20)
        self._keep(chunk)
        if not self.muted:
            clear_announcement_before_stderr()
            sys.stderr.write(self._decode(chunk))
            sys.stderr.flush()
        return bool(chunk)

    def close_write_end(self) -> None:
        """Close the launcher's copy of the write end, so that the pipe ends when rank 0 ends."""
        os.close(self.write_end)
        self.write_end = -1

    def close(self) -> None:
        if self.write_end >= 0:
            self.close_write_end()
        os.close(self.read_end)
        if self._log is not None:
            self._log.close()

    def _keep(self, chunk: bytes) -> None:
        """Write to the log; a log that fails is reported once and does not end the ranks."""
        if self._log is None:
            return
        try:
            self._log.write(chunk)
        except OSError as error:
            sys.stderr.write(f"megalite: {self._log.name} cannot be written any more: {error.strerror}\n")
            self._log.close()
            self._log = None


class _Signals:
    """Turns signals, SIGCHLD included, into bytes on a socket that a selector can wait for (signal.set_wakeup_fd)."""

    def __enter__(self) -> Self:
        self.read_end, self._write_end = socket.socketpair()
        self.read_end.setblocking(False)
        self._write_end.setblocking(False)
        self._before = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        # An ignored signal stays ignored: nohup relies on that.
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, _do_nothing) for number in (*handled, signal.SIGCHLD)}
        return self

    def received(self) -> list[int]:
        """Return the numbers of the signals that arrived since the last call."""
        with suppress(BlockingIOError):
            return list(self.read_end.recv(4096))
        return []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._before)
        self.read_end.close()
        self._write_end.close()


def _do_nothing(number: int, frame: object) -> None:
    pass


@dataclass(slots=True)
class _Supervisor:
    """Waits for the ranks; records the rank that failed first or the signal received, and when to kill the rest."""

    signals: _Signals
    failure_grace: float
    stop_grace: float
    ranks: Sequence[_Rank] = ()
    console: _Console = field(init=False)
    alive: list[_Rank] = field(init=False)
    failed: _Rank | None = None
    stopped_by: int | None = None
    interrupted: bool = False
    """Whether a signal was received, possibly after a failure."""
    kill_at: float = math.inf
    """The time at which the remaining ranks are killed, by time.monotonic()."""
    failure: str = ""
    """A description of the failure; empty if the run did not fail."""

    @property
    def may_restart(self) -> bool:
        """Whether a rank failed, by no UserError, and nobody asked the run to stop: a restart may succeed."""
        asked = self.interrupted or any(rank.status == STOPPED_STATUS for rank in self.ranks)
        return self.failed is not None and self.failed.status != USER_ERROR_STATUS and not asked

    def run(self, ranks: Sequence[_Rank], console: _Console) -> None:
        """Wait until every rank has ended; call it once."""
        self.ranks, self.console, self.alive = ranks, console, list(ranks)
        with selectors.DefaultSelector() as selector:
            selector.register(self.signals.read_end, selectors.EVENT_READ)
            selector.register(self.console.read_end, selectors.EVENT_READ)
            # A rank may have ended before the first select: collect ended ranks first.
            while self._collect():
                timeout = max(0.0, self.kill_at - time.monotonic())
                for key, _ in selector.select(None if math.isinf(timeout) else timeout):
                    if key.fileobj is self.signals.read_end:
                        self._handle(self.signals.received())
                    elif not self.console.pump():
                        selector.unregister(self.console.read_end)
                if time.monotonic() >= self.kill_at:
                    self._kill()
            if self.console.read_end in selector.get_map():
                self._drain()

    def _collect(self) -> bool:
        """Record the ranks that have ended; return False when no rank runs any more."""
        ended = [rank for rank in self.alive if rank.has_ended()]
        self.alive = [rank for rank in self.alive if rank not in ended]
        failed = [rank for rank in ended if rank.status not in (0, STOPPED_STATUS)]
        if failed:
            # The peers of a failed rank cannot go on, whether or not a signal asked them to stop.
            self.kill_at = min(self.kill_at, time.monotonic() + self.failure_grace)
        if failed and self.failed is None and self.stopped_by is None:
            self.failed = min(failed, key=_Rank.may_be_a_consequence)
            # After a peer died, rank 0 prints only messages about lost connections: drop them. After a UserError rank 0
            # may be the rank that prints the user's message.
            self.console.muted = self.failed.number != 0 and self.failed.status != USER_ERROR_STATUS
        return bool(self.alive)

    def _handle(self, received: Sequence[int]) -> None:
        for number in received:
            if number == signal.SIGCHLD:
                continue
            self.interrupted = True
            if self.stopped_by is not None or self.failed is not None:
                self._kill()
                continue
            self.stopped_by = number
            self.kill_at = time.monotonic() + self.stop_grace
            if math.isinf(self.stop_grace):
                sys.stderr.write(
                    "megalite: asked to stop; training ends after this step; send the signal again to end at once\n"
                )
            for rank in self.alive:
                rank.send(number)

    def _kill(self) -> None:
        for rank in self.alive:
            rank.kill()
        self.kill_at = math.inf

    def _drain(self) -> None:
        """Copy the rest of rank 0's output without waiting for processes that rank 0 started."""
        os.set_blocking(self.console.read_end, False)
        with suppress(BlockingIOError):
            self.console.pump()

    def report(self) -> int:
        """Return the exit status of the run; describe a failure in `failure` and on stderr."""
        statuses = {rank.status for rank in self.ranks}
        if statuses <= {0, STOPPED_STATUS}:
            return max(statuses)
        if self.stopped_by is not None:
            self.failure = f"stopped by signal {signal.Signals(self.stopped_by).name}"
            sys.stderr.write(f"megalite: {self.failure}\n")
            return 128 + self.stopped_by
        assert self.failed is not None
        self._report_rank(self.failed)
        return self.failed.status if self.failed.status > 0 else 128 - self.failed.status

    def _report_rank(self, rank: _Rank) -> None:
        """Print which rank failed first and the last lines of its log; those of rank 0 are on the console already."""
        lines = rank.tail()
        self.failure = f"{rank.describe_end()}; its log: {rank.log}"
        if rank.status == USER_ERROR_STATUS:
            speaker = self.ranks[0] if self.ranks[0].status == USER_ERROR_STATUS else rank
            messages = [line for line in speaker.tail() if line.startswith(USER_ERROR_PREFIX)]
            if messages:
                self.failure = "\n".join(line.removeprefix(USER_ERROR_PREFIX) for line in messages)
            if speaker is self.ranks[0]:
                return
            if messages:
                sys.stderr.write("".join(f"{line}\n" for line in messages))
                return
        start = next((at for at, line in enumerate(lines) if "Traceback (most recent call last)" in line), -20)
        shown = lines[start:] if rank.number else []
        sys.stderr.write("".join(f"{line}\n" for line in (*shown, f"megalite: {self.failure}")))
