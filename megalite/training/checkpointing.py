"""When and how a run saves: every rank its share, in a thread, and one rank the whole.

A save is the same with and without ``checkpoint.async``: without it the ranks wait for its end at once. With it, the
thread first copies what this rank holds to host memory, for which only the next update of the weights has to wait.
"""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalite.checkpoint import store
from megalite.checkpoint.fragments import parts
from megalite.checkpoint.manifest import Manifest
from megalite.checkpoint.retention import prune
from megalite.checkpoint.save_report import SaveReport
from megalite.checkpoint.store import Part
from megalite.config.sections import CheckpointSection
from megalite.errors import UserError
from megalite.files import write_atomically
from megalite.parallel.json_collectives import broadcast_json, gather_json
from megalite.parallel.mesh import Mesh
from megalite.zero.optimizer_state import ZeroState

LATEST = "LATEST"
TELL_SECONDS = 1.0
"""How often the ranks that wait for a save tell each other that it goes on."""
SETTLE_SECONDS = 8.0
"""How long a rank that has to end waits for the others' parts."""


@dataclass(slots=True)
class _Save:
    """A save under way on this rank."""

    report: SaveReport
    began: float
    written: Future[None] = field(default_factory=Future)
    copied: Future[None] = field(default_factory=Future)
    may_change: bool = False
    """Whether every rank has copied what it saves."""
    others_failed: threading.Event = field(default_factory=threading.Event)
    finished: Future[Path] | None = None
    moves: int = 0
    """Grows as this rank's thread gets on with its work."""

    def moved(self) -> None:
        """Take note that this rank's thread got on."""
        self.moves += 1


class Checkpointer:
    """Writes ``step_N`` folders below `root`. Collective where it says so; one save at a time.

    `on_save_point` is called with the name of each point of a save that is passed, so that a test can stop there.
    `moved` is called on every rank that waits for a save, as long as one of the ranks gets on with it: a save may take
    longer than a rank may stand still.
    """

    def __init__(
        self,
        settings: CheckpointSection,
        root: Path,
        state: ZeroState,
        mesh: Mesh,
        *,
        tensor_bytes: int,
        files: Mapping[str, bytes],
        on_save_point: Callable[[str], None] = lambda point: None,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self._moved = moved
        self._settings, self._root, self._state, self._mesh = settings, root, state, mesh
        self._needed, self._files, self._on_save_point = tensor_bytes, files, on_save_point
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._buffer: torch.Tensor | None = None
        self._under_way: _Save | None = None
        self._untold: list[SaveReport] = []
        self._warned: set[str] = set()

    def due(self, step: int, last: int) -> bool:
        """Whether `step` ends with a save."""
        return self._settings.due(step, last)

    def save(self, manifest: Manifest, state: Mapping[str, Any]) -> None:
        """Save, once the save before is done. Collective.

        Raises UserError where either failed, unless ``checkpoint.on_error`` is ``continue``.
        """
        self.wait()
        began = time.perf_counter()
        report = SaveReport(manifest.step, self._root / f"step_{manifest.step}")
        report.failure = self._begin(report.folder)
        if report.failure is not None:
            self._judge(report)
            return
        save = self._under_way = _Save(report, began)
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)
        mine = list(parts(self._state.fragments()))
        self._thread.submit(self._write, save, mine)
        if self._mesh.rank == 0:
            save.finished = self._thread.submit(self._finish, save, manifest, dict(state))
        report.blocked_seconds = time.perf_counter() - began
        if not self._settings.asynchronous:
            self.wait()

    def before_update(self) -> None:
        """Wait until the state that is being saved may change. Collective in the first call after a save began."""
        save = self._under_way
        if save is not None and not save.may_change:
            with self._blocking(save.report):
                self._wait_together(save, save.copied)
            save.may_change = True

    def take_reports(self) -> list[SaveReport]:
        """Return the saves that ended since the last call, as far as this rank knows: rank 0 knows first.

        Raises UserError where this rank's part of a save failed, unless ``checkpoint.on_error`` is ``continue``.
        """
        save = self._under_way
        if save is not None and save.written.done():
            failure = save.written.exception()
            if failure is not None and self._settings.on_error == "stop":
                save.report.failure = self._on_this_rank(failure)
                self._judge(save.report)
            if save.finished is not None and save.finished.done() and save.finished.exception() is None:
                self._tell(save.report)
        reports, self._untold = self._untold, []
        return reports

    def wait(self) -> None:
        """Wait for the save under way, if there is one. Collective.

        Raises UserError where it failed, unless ``checkpoint.on_error`` is ``continue``.
        """
        save, self._under_way = self._under_way, None
        if save is None:
            return
        report = save.report
        with self._blocking(report):
            self._wait_together(save, save.written)
            failures = [told for told in gather_json(self._failure(save.written), self._mesh) if told is not None]
            if failures:
                save.others_failed.set()
            self._wait_together(save, save.finished)
            finished = self._failure(save.finished) if save.finished is not None else None
            report.failure = next(iter(failures), broadcast_json(finished, self._mesh))
        if report.failure is not None and self._mesh.rank == 0:
            store.discard(report.folder)
        self._judge(report)

    def _wait_together(self, save: _Save, future: Future[Any] | None) -> None:
        """Wait until every rank's future is done, where it has one. Collective.

        No rank waits in a collective for as long as another writes: it would be taken for one that hangs, and the
        collective would give up.
        """
        before, everywhere = -1, False
        while not everywhere:
            with suppress(TimeoutError):
                if future is not None:
                    future.exception(TELL_SECONDS)
            told = gather_json([future is None or future.done(), save.moves], self._mesh)
            everywhere = all(done for done, _ in told)
            moves = sum(number for _, number in told)
            if moves != before:
                before = moves
                self._moved()

    def close(self) -> None:
        """End the thread, without waiting for the other ranks."""
        self._thread.shutdown(cancel_futures=True)

    def settle(self) -> None:
        """Wait for this rank's part of a save under way; for a rank that has to end, on its own."""
        save = self._under_way
        if save is not None:
            save.written.exception()
            if save.finished is not None:
                with suppress(TimeoutError):  # a peer may have ended before it began to write
                    save.finished.exception(SETTLE_SECONDS)

    def _begin(self, folder: Path) -> str | None:
        """Make room on the disk; return why there is none, the same on every rank."""
        failure = None
        if self._mesh.rank == 0:
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self._root).free
                if free < self._needed:
                    failure = f"needs {self._needed:,} bytes, and {free:,} are free there"
                else:
                    store.begin(folder)
            except OSError as error:
                failure = self._on_this_rank(error)
            self._on_save_point("begun")
        return broadcast_json(failure, self._mesh)

    def _write(self, save: _Save, mine: Sequence[Part]) -> None:
        try:
            if self._settings.asynchronous:
                mine = self._copy(mine, save.moved)
            save.copied.set_result(None)
            store.write_rank(save.report.folder, self._mesh.rank, mine, save.moved)
            self._on_save_point("written")
            save.written.set_result(None)
        except BaseException as error:
            save.written.set_exception(error)
        finally:
            if not save.copied.done():
                save.copied.set_result(None)

    def _copy(self, mine: Sequence[Part], moved: Callable[[], None]) -> list[Part]:
        """Copy the parts into one buffer, which stays: memory that is new costs more than the copy."""
        sizes = [part.region.numel for part in mine]
        if self._buffer is None or self._buffer.numel() < sum(sizes):
            pin = self._mesh.device.type == "cuda"
            self._buffer = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=pin)
        copies, start = [], 0
        for part, size in zip(mine, sizes, strict=True):
            room = self._buffer[start : start + size].numpy().reshape(part.region.shape)
            np.copyto(room, part.load())
            copies.append(Part(part.name, part.global_shape, part.region, _Held(room)))
            start += size
            moved()
        return copies

    def _finish(self, save: _Save, manifest: Manifest, state: Mapping[str, Any]) -> Path:
        def alive() -> None:
            if save.others_failed.is_set():
                raise UserError("another rank failed")

        def on_save_point(point: str) -> None:
            save.moved()
            self._on_save_point(point)

        ranks = self._mesh.layout.world_size
        folder = store.finish(
            save.report.folder,
            ranks=ranks,
            manifest=manifest,
            state=state,
            files=self._files,
            alive=alive,
            on_save_point=on_save_point,
        )
        save.report.durable_seconds = time.perf_counter() - save.began
        save.report.bytes = sum(file.stat().st_size for file in folder.iterdir())
        on_save_point("published")
        # The checkpoint is there: what fails from here on is told, and is no failure of the save.
        try:
            write_atomically(self._root / LATEST, f"{folder.name}\n".encode())
        except OSError as error:
            self._warn(save.report, f"{self._root / LATEST}", f"is not up to date: {error.strerror or error}")
        on_save_point("latest")
        prune(
            self._root,
            self._settings.keep_last,
            self._settings.keep_every,
            warn=lambda old, what: self._warn(save.report, f"the old checkpoint {old}", what),
        )
        on_save_point("pruned")
        return folder

    def _warn(self, report: SaveReport, subject: str, what: str) -> None:
        """Add to a report's warnings, once in a run about each thing."""
        if subject not in self._warned:
            self._warned.add(subject)
            report.warnings.append(f"{subject}: {what}")

    def _failure(self, future: Future[Any]) -> str | None:
        """Wait for a future; return how it failed."""
        failure = future.exception()
        return None if failure is None else self._on_this_rank(failure)

    def _on_this_rank(self, failure: BaseException) -> str:
        reason = failure.strerror if isinstance(failure, OSError) else None
        return f"rank {self._mesh.rank} on {socket.gethostname()}: {reason or failure}"

    def _judge(self, report: SaveReport) -> None:
        self._tell(report)
        if report.failure is not None and self._settings.on_error == "stop":
            raise UserError(
                f"{report.folder}: not written: {report.failure}; earlier checkpoints are as they were; make room, "
                "lower checkpoint.keep_last, or go on without with checkpoint.on_error=continue"
            )

    def _tell(self, report: SaveReport) -> None:
        if not report.reported:
            report.reported = True
            self._untold.append(report)

    @contextmanager
    def _blocking(self, report: SaveReport) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            report.blocked_seconds += time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class _Held:
    """Calls for an array that is in memory."""

    array: np.ndarray

    def __call__(self) -> np.ndarray:
        return self.array
