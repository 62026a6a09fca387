"""Processes of ``python -m megalite`` that begin with torch and deepspeed loaded: `Popen` and `run`, as subprocess has.

A fresh interpreter spends five seconds of a core on these imports before it does anything of ours, and a run has a
launcher and a process a rank. Here a server process imports them once and forks; a launcher that was forked forks its
ranks in turn. Everything else is as after an exec: the parent that waits and sends signals, sessions, descriptors,
environment, signal handlers, standard streams. /proc shows the server's command and environment, so tests find a rank
by `rank_of`.

How an interpreter starts and ends is seen in fresh processes alone: a test of that uses subprocess, or `run` with
``fresh=True``. Elsewhere than on Linux, and where the process is to find a GPU, all are fresh.
"""

import atexit
import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import psutil

MEGALITE = (sys.executable, "-m", "megalite")
ENGINE = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36

_forked = False
"""Whether this process came from the server."""


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen` that forks where the command is ``python -m megalite``, rather than start an interpreter."""

    def _execute_child(self, args: Any, *more: Any) -> None:
        # The order is that of subprocess in Python 3.11 and 3.12.
        preexec_fn, pass_fds, cwd, env = more[1], more[3], more[4], more[5]
        ends, start_new_session = more[9:15], more[20]
        environment = dict(os.environ if env is None else env)
        asked = preexec_fn is None and not pass_fds and _is_megalite(args) and _may_fork(environment)
        if not asked:
            super()._execute_child(args, *more)  # pyright: ignore[reportAttributeAccessIssue]
            return
        streams = [own if end == -1 else end for own, end in enumerate((ends[0], ends[3], ends[5]))]
        request = {
            "argv": [os.fspath(word) for word in args[3:]],
            "cwd": os.fspath(cwd) if cwd is not None else os.getcwd(),
            "environment": environment,
            "session": bool(start_new_session),
            "parent": os.getpid(),
        }
        self.pid = _fork(request, streams) if _forked else _server().start(request, streams)
        self._child_created = True
        self._close_pipe_fds(*ends)  # pyright: ignore[reportAttributeAccessIssue]


def run(
    command: Sequence[Any], *, timeout: float, fresh: bool = False, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end as `subprocess.run` does; its output is captured as text unless `options` differ."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    with (subprocess.Popen if fresh else Popen)(list(command), **given) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def rank_of(process: psutil.Process) -> int:
    """Return which rank of a run a process is, forked or fresh; -1 where it is none."""
    name, _, number = process.name().partition(" ")
    return int(number) if name == "rank" and number.isdigit() else int(process.environ().get("RANK", -1))


def _is_megalite(args: Any) -> bool:
    return not isinstance(args, str | bytes | os.PathLike) and tuple(args[:3]) == MEGALITE


def _may_fork(environment: Mapping[str, str]) -> bool:
    # A process with threads, as a rank has, cannot be forked safely.
    alone = not _forked or len(os.listdir("/proc/self/task")) == 1
    return sys.platform == "linux" and alone and (environment.items() >= ENGINE.items() or _forked or not _sees_gpu())


@cache
def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# ---- the test's side


class _Server:
    """The process that has everything imported; it ends with this one."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        variables = {**os.environ, **ENGINE, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def start(self, request: Mapping[str, Any], streams: Sequence[int]) -> int:
        """Have a process started with these descriptors as its standard streams, as a child of this one."""
        prctl = ctypes.CDLL(None).prctl
        with self._lock:
            # The server's grandchild loses its parent at once, and goes to the nearest that takes such in.
            prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._connection, [json.dumps(request).encode()], list(streams))
                reply = self._connection.recv(64)
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if not reply:
            raise RuntimeError(f"the server of warm processes ended with status {self._process.wait()}")
        return int(reply)

    def close(self) -> None:
        self._connection.close()
        self._process.wait()


@cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.close)
    return server


# ---- the server's side, and that of what it forks


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Fork a process for each request; returns the request, in that process alone."""
    while True:
        message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            os._exit(0)
        request = json.loads(message)
        read_end, write_end = os.pipe()
        if (between := os.fork()) == 0:
            if pid := os.fork():
                os.write(write_end, str(pid).encode())
                os._exit(0)
            for descriptor in (read_end, write_end, connection.fileno()):
                os.close(descriptor)
            _begin(request, streams)
            return request
        os.waitpid(between, 0)
        connection.send(os.read(read_end, 64))
        for descriptor in (read_end, write_end, *streams):
            os.close(descriptor)


def _fork(request: Mapping[str, Any], streams: Sequence[int]) -> int:
    """Fork a rank of this launcher and run it to its end; returns its id, in the launcher alone."""
    everything = set(signal.Signals)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, everything)
    if pid := os.fork():
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    try:
        _begin(request, streams)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _end_as_an_interpreter(request["argv"])
    finally:
        os._exit(70)


def _begin(request: Mapping[str, Any], streams: Sequence[int]) -> None:
    """Make this process what it would be after an exec."""
    global _forked
    _forked = True
    while os.getppid() != request["parent"]:
        time.sleep(0.0005)
    if request["session"]:
        os.setsid()
    signal.set_wakeup_fd(-1)
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    copies = [os.dup(stream) for stream in streams]
    for number, copy in enumerate(copies):
        os.dup2(copy, number)
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    _open_streams(bool(os.environ.get("PYTHONUNBUFFERED")))

    import torch

    from megalite.launch import environment

    environment._IMPORTED = time.time()  # an interpreter would import it now
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    sys.argv = [str(Path(sys.modules["megalite"].__path__[0], "__main__.py")), *request["argv"]]
    if "RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_NAME, f"rank {os.environ['RANK']}".encode(), 0, 0, 0)


def _open_streams(unbuffered: bool) -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        reads, is_error = name == "stdin", name == "stderr"
        stream: Any = open(  # noqa: SIM115
            number,
            "r" if reads else "w",
            buffering=1 if is_error or os.isatty(number) else -1,
            errors="backslashreplace" if is_error else "strict",
            closefd=False,
        )
        stream.buffer.raw.name = f"<{name}>"
        if unbuffered and not reads:
            stream.reconfigure(write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _end_as_an_interpreter(argv: Sequence[str]) -> NoReturn:
    from megalite.cli import main

    status: Any = 1
    try:
        status = main(argv)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = 120
    os._exit(status)


def _main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import preload  # noqa: F401

    connection = socket.socket(fileno=int(sys.argv[1]))
    # What a run starts of itself is to be forked too.
    sys.modules.setdefault("warm", sys.modules["__main__"])
    subprocess.Popen = Popen  # pyright: ignore[reportAttributeAccessIssue]
    # A collection would touch, and so copy, all that was imported.
    gc.freeze()
    request = _serve(connection)
    connection.detach()
    _end_as_an_interpreter(request["argv"])


if __name__ == "__main__":
    _main()
