"""Saving of checkpoints, synchronous or asynchronous: a thread of each rank writes a shard, rank 0 publishes the whole.

Without ``checkpoint.async`` the ranks wait for the end of the save at once. With it, the thread first copies this
rank's state to host memory; only the next update of the weights waits for the copy.
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
from megalite.parallel.json_collectives import gather_json, on_rank_zero
from megalite.parallel.mesh import Mesh
from megalite.training.engine import EngineState

LATEST = "LATEST"
PROGRESS_INTERVAL_SECONDS = 1.0
"""The interval at which ranks that wait for a save exchange their progress."""
OTHER_RANKS_SECONDS = 8.0
"""How long a rank that ends with an error waits for the other ranks' shards."""


@dataclass(slots=True)
class _Save:
    """The state of a save on this rank."""

    report: SaveReport
    started: float
    written: Future[None] = field(default_factory=Future)
    copied: Future[None] = field(default_factory=Future)
    may_change: bool = False
    """Whether every rank has copied its state, so that the weights may be updated."""
    others_failed: threading.Event = field(default_factory=threading.Event)
    finished: Future[Path] | None = None
    progress: int = 0
    """A counter that grows with every step of this rank's thread."""

    def on_progress(self) -> None:
        """Count a step of this rank's thread."""
        self.progress += 1


class Checkpointer:
    """Writes checkpoints, ``step_N`` folders below `root`, one at a time.

    `on_save_point` is called with the name of each point that a save passes, so that a test can stop there.
    `on_progress` is called on every rank that waits for a save, whenever any rank makes progress with it, since a save
    may take longer than the timeout of a rank without progress.
    """

    def __init__(
        self,
        settings: CheckpointSection,
        root: Path,
        state: EngineState,
        mesh: Mesh,
        *,
        tensor_bytes: int,
        files: Mapping[str, bytes],
        on_save_point: Callable[[str], None] = lambda point: None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_progress = on_progress
        self._settings, self._root, self._state, self._mesh = settings, root, state, mesh
        self._needed, self._files, self._on_save_point = tensor_bytes, files, on_save_point
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._buffer: torch.Tensor | None = None
        self._current: _Save | None = None
        self._unreported: list[SaveReport] = []
        self._warned: set[str] = set()

    def due(self, step: int, last: int) -> bool:
        """Return whether a checkpoint is saved after `step`."""
        return self._settings.due(step, last)

    def save(self, manifest: Manifest, state: Mapping[str, Any]) -> None:
        """Wait for the previous save, and start to save a checkpoint. Collective.

        Raises UserError where either failed, unless ``checkpoint.on_error`` is ``continue``.
        """
        self.wait()
        started = time.perf_counter()
        report = SaveReport(manifest.step, self._root / f"step_{manifest.step}")
        report.failure = self._begin(report.folder)
        if report.failure is not None:
            self._raise_if_failed(report)
            return
        save = self._current = _Save(report, started)
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)
        mine = list(parts(self._state.fragments()))
        self._thread.submit(self._write, save, mine)
        if self._mesh.rank == 0:
            save.finished = self._thread.submit(self._finish, save, manifest, dict(state))
        report.blocked_seconds = time.perf_counter() - started
        if not self._settings.asynchronous:
            self.wait()

    def before_update(self) -> None:
        """Wait until all ranks have copied the state that is being saved. Collective in the first call after `save`."""
        save = self._current
        if save is not None and not save.may_change:
            with self._blocking(save.report):
                self._wait_together(save, save.copied)
            save.may_change = True

    def take_reports(self) -> list[SaveReport]:
        """Return the reports of saves that ended since the last call; rank 0 gets a report before other ranks.

        Raises UserError where this rank's part of a save failed, unless ``checkpoint.on_error`` is ``continue``.
        """
        save = self._current
        if save is not None and save.written.done():
            failure = save.written.exception()
            if failure is not None and self._settings.on_error == "stop":
                save.report.failure = self._on_this_rank(failure)
                self._raise_if_failed(save.report)
            if save.finished is not None and save.finished.done() and save.finished.exception() is None:
                self._add_report(save.report)
        reports, self._unreported = self._unreported, []
        return reports

    def wait(self) -> None:
        """Wait for the current save, if there is one. Collective.

        Raises UserError where it failed, unless ``checkpoint.on_error`` is ``continue``.
        """
        save, self._current = self._current, None
        if save is None:
            return
        report = save.report
        with self._blocking(report):
            self._wait_together(save, save.written)
            failures = [text for text in gather_json(self._failure(save.written), self._mesh) if text is not None]
            if failures:
                save.others_failed.set()
            self._wait_together(save, save.finished)
            finished = save.finished
            published = on_rank_zero(lambda: self._failure(finished) if finished is not None else None, self._mesh)
            report.failure = next(iter(failures), published)
        if report.failure is not None and self._mesh.rank == 0:
            store.discard(report.folder)
        self._raise_if_failed(report)

    def _wait_together(self, save: _Save, future: Future[Any] | None) -> None:
        """Wait until the futures of all ranks are done. Collective.

        Ranks exchange their states at intervals instead of waiting in one collective for the slowest writer: that
        collective would run into its timeout, and the waiting ranks would seem to hang.
        """
        before, all_done = -1, False
        while not all_done:
            with suppress(TimeoutError):
                if future is not None:
                    future.exception(PROGRESS_INTERVAL_SECONDS)
            states = gather_json([future is None or future.done(), save.progress], self._mesh)
            all_done = all(done for done, _ in states)
            progress = sum(count for _, count in states)
            if progress != before:
                before = progress
                self._on_progress()

    def close(self) -> None:
        """End the thread, without waiting for the other ranks."""
        self._thread.shutdown(cancel_futures=True)

    def settle(self) -> None:
        """Wait for this rank's part of the current save, before this rank ends with an error. Not collective."""
        save = self._current
        if save is not None:
            save.written.exception()
            if save.finished is not None:
                with suppress(TimeoutError):  # another rank may have ended before it wrote its shard
                    save.finished.exception(OTHER_RANKS_SECONDS)

    def _begin(self, folder: Path) -> str | None:
        """Create the folder of a checkpoint; return the reason of a failure, the same on every rank."""

        def begin() -> str | None:
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self._root).free
                if free < self._needed:
                    return f"needs {self._needed:,} bytes, and {free:,} are free there"
                store.begin(folder)
            except OSError as error:
                return self._on_this_rank(error)
            self._on_save_point("begun")
            return None

        return on_rank_zero(begin, self._mesh)

    def _write(self, save: _Save, mine: Sequence[Part]) -> None:
        try:
            if self._settings.asynchronous:
                mine = self._copy(mine, save.on_progress)
            save.copied.set_result(None)
            store.write_rank(save.report.folder, self._mesh.rank, mine, save.on_progress)
            self._on_save_point("written")
            save.written.set_result(None)
        except BaseException as error:
            save.written.set_exception(error)
        finally:
            if not save.copied.done():
                save.copied.set_result(None)

    def _copy(self, mine: Sequence[Part], on_progress: Callable[[], None]) -> list[Part]:
        """Copy the parts into a buffer that is kept, since new memory costs more time than the copy."""
        sizes = [part.region.numel for part in mine]
        if self._buffer is None or self._buffer.numel() < sum(sizes):
            pin = self._mesh.device.type == "cuda"
            self._buffer = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=pin)
        copies, start = [], 0
        for part, size in zip(mine, sizes, strict=True):
            view = self._buffer[start : start + size].numpy().reshape(part.region.shape)
            np.copyto(view, part.load())
            copies.append(Part(part.name, part.global_shape, part.region, _InMemory(view)))
            start += size
            on_progress()
        return copies

    def _finish(self, save: _Save, manifest: Manifest, state: Mapping[str, Any]) -> Path:
        def alive() -> None:
            if save.others_failed.is_set():
                raise UserError("another rank failed")

        def on_save_point(point: str) -> None:
            save.on_progress()
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
        save.report.durable_seconds = time.perf_counter() - save.started
        save.report.bytes = sum(file.stat().st_size for file in folder.iterdir())
        on_save_point("published")
        # The checkpoint is published: failures from here on are warnings, and no failure of the save.
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
        """Add a warning to a report, once per run for each subject."""
        if subject not in self._warned:
            self._warned.add(subject)
            report.warnings.append(f"{subject}: {what}")

    def _failure(self, future: Future[Any]) -> str | None:
        """Wait for a future; return the text of its failure, None where it succeeded."""
        failure = future.exception()
        return None if failure is None else self._on_this_rank(failure)

    def _on_this_rank(self, failure: BaseException) -> str:
        reason = failure.strerror if isinstance(failure, OSError) else None
        return f"rank {self._mesh.rank} on {socket.gethostname()}: {reason or failure}"

    def _raise_if_failed(self, report: SaveReport) -> None:
        self._add_report(report)
        if report.failure is not None and self._settings.on_error == "stop":
            raise UserError(
                f"{report.folder}: not written: {report.failure}; earlier checkpoints are unchanged; free disk space, "
                "lower checkpoint.keep_last, or continue without this checkpoint with checkpoint.on_error=continue"
            )

    def _add_report(self, report: SaveReport) -> None:
        if not report.reported:
            report.reported = True
            self._unreported.append(report)

    @contextmanager
    def _blocking(self, report: SaveReport) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            report.blocked_seconds += time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class _InMemory:
    """A callable that returns an array in memory, as `Part.load`."""

    array: np.ndarray

    def __call__(self) -> np.ndarray:
        return self.array
