"""How a verb that fails says so: one message, from one rank, and an end that waits for nobody."""

import io
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from megalite.errors import USER_ERROR_STATUS
from megalite.launch import USER_ERROR_PREFIX, LaunchEnvironment, clear_announcement_before_stderr

USER_ERRORS = "MEGALITE_USER_ERRORS"
"""Names a file that ranks say errors of the user's in too: torchrun and others do not hand on the status of a rank."""

RANK_ZERO_SECONDS = 10.0
"""How long another rank waits to see whether rank 0 went on without the error that it has found itself."""
COMMON_SECONDS = 1.0
"""How long another rank leaves rank 0 to say an error that all have found together."""


def say_user_error(message: str, rank: LaunchEnvironment | None, *, common: bool = False) -> None:
    """Print a line for each fault, from one rank: nearly always every rank has found the same.

    Rank 0 speaks for all, since the others' stderr is often the same as its own, and since a launcher ends the run
    with the first rank that ends: the others leave it the time. What rank 0 has not found, they say themselves; it has
    found what is `common`.
    """
    # The ranks of `launch_local` have a log each, one of which it shows.
    shares_console = rank is not None and rank.launcher != "megalite"
    if rank is None or rank.rank == 0 or not shares_console or not _rank_zero_speaks(rank, common):
        lines = "".join(f"{USER_ERROR_PREFIX}{line}\n" for line in message.splitlines())
        clear_announcement_before_stderr()  # of what a start was doing
        sys.stderr.write(lines)
        if rank is not None and USER_ERRORS in os.environ:
            with suppress(OSError), Path(os.environ[USER_ERRORS]).open("a", encoding="utf-8") as file:
                file.write(lines)


def _rank_zero_speaks(rank: LaunchEnvironment, common: bool) -> bool:
    """Leave rank 0 the time to say an error, and return whether it has found it."""
    # A launcher that ends this rank because rank 0 has ended must find the same status.
    signal.signal(signal.SIGTERM, lambda number, frame: leave(USER_ERROR_STATUS))
    if common:
        time.sleep(COMMON_SECONDS)
    return common or not _rank_zero_went_on(rank)


def _rank_zero_went_on(rank: LaunchEnvironment) -> bool:
    """Whether rank 0 opens the port where the ranks meet, as it does once it has found no error."""
    deadline = time.monotonic() + RANK_ZERO_SECONDS
    while rank.master_address and rank.master_port and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((rank.master_address, rank.master_port), timeout=1):
            return True
        time.sleep(0.1)
    return False


def say_failure(rank: LaunchEnvironment, message: str) -> None:
    """Print a message in one piece, with the rank and host on every line: ranks may share a console."""
    mark = f"[rank {rank.rank} on {socket.gethostname()}] "
    sys.stderr.write("".join(f"{mark}{line}\n" for line in message.splitlines()))


class _Stdout(io.FileIO):
    """Puts its name into the system's refusals, so that they are told from those of any other file."""

    NAME = "standard output"

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = self.NAME
            raise


@contextmanager
def named_stdout() -> Iterator[None]:
    """Let what cannot be written to stdout be known by `stdout_refused`; not where something else stands for it."""
    plain = sys.stdout
    if not isinstance(plain, io.TextIOWrapper) or plain is not sys.__stdout__:
        yield
        return
    plain.flush()
    named = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(plain.fileno(), "wb", closefd=False)),
        encoding=plain.encoding,
        errors=plain.errors,
        line_buffering=plain.line_buffering or plain.write_through,
    )
    sys.stdout = named
    try:
        yield
        named.flush()
    finally:
        sys.stdout = plain
        with suppress(OSError):  # a second refusal says no more than the first
            named.flush()


def stdout_refused(error: Exception) -> TypeGuard[OSError]:
    """Tell whether an error is that stdout takes no more, on a full disk say."""
    return isinstance(error, OSError) and error.filename == _Stdout.NAME


def say_lost_output(error: OSError) -> None:
    """Print in one line that stdout takes no more."""
    sys.stderr.write(f"{USER_ERROR_PREFIX}standard output cannot be written: {error.strerror}\n")


def leave(status: int) -> NoReturn:
    """End this rank now, with its output written and nothing of the interpreter taken down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
