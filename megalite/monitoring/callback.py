"""Callback: what observes a run. Megalite's own logs are callbacks, and a plugin registers further ones.

Callbacks observe. What decides the course of a run, such as checkpoints, stop requests and loss spikes, is in the
training loop.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

from megalite.checkpoint.save_report import SaveReport
from megalite.config import RunConfig
from megalite.data.datasets import Datasets
from megalite.kernels.choice import NATIVE, Kernels
from megalite.model.stage import Stage
from megalite.monitoring.heartbeat import Phase
from megalite.monitoring.step_report import StepReport
from megalite.parallel.mesh import Mesh
from megalite.registry import CALLBACKS


@dataclass(frozen=True, slots=True)
class RunStart:
    """What a run begins with on this rank."""

    config: RunConfig
    mesh: Mesh
    """The rank's groups: ``mesh.rank``, ``mesh.layout``, ``mesh.device``."""
    stages: Mapping[int, Stage]
    """The rank's pipeline stages, modules of torch, by their index. ZeRO-3 partitions their parameters."""
    datasets: Datasets
    step: int = 0
    """The last step that is done already."""
    restarts: int = 0
    """How often the ranks were restarted after a failure."""
    kernels: Kernels = NATIVE
    """The implementations of matrix products and attention."""


@dataclass(frozen=True, slots=True)
class RunEnd:
    """How a run ended."""

    step: int
    """The last step that was done."""
    complete: bool
    """Whether that is `train.steps`."""
    tokens: int = 0
    """The tokens that this start and those before it have trained on."""
    stopped_by: str | None = None
    """The stop request that ended the run before its last step, such as ``SIGTERM``; None without a request."""


class Callback:
    """Observes a run; a subclass overrides the methods it needs. Every rank calls them, in the same order.

    A method of every rank may therefore communicate over the groups of `RunStart.mesh`, unless its description says
    otherwise. An exception ends the run; a `UserError` ends it with its message alone.
    """

    def on_start(self, start: RunStart) -> None:
        """Begin to observe a run, before its first step."""

    def before_step(self, step: int) -> None:
        """Observe that a step, counted from 1, begins."""

    def on_phase(self, phase: Phase, step: int) -> None:
        """Observe that a phase begins: ``data``, ``compute`` and ``update`` of a step, ``evaluate`` and ``save``."""

    def after_step(self, report: StepReport) -> None:
        """Observe a finished step, before an evaluation or a checkpoint of its weights."""

    def on_rollback(self, step: int, back: int, skipped_samples: int) -> None:
        """Observe that the run went from `step` back to step `back`, and skips so many samples from there on."""

    def on_evaluate(self, step: int, name: str, loss: float) -> None:
        """Observe the mean loss over the validation set `name` after `step`, in nats per token."""

    def on_checkpoint(self, report: SaveReport) -> None:
        """Observe a save that has ended, well or not. Ranks may call it after different steps: do not communicate."""

    def on_end(self, end: RunEnd) -> None:
        """Observe the end of a run that no error ended."""

    def close(self) -> None:
        """Free what the callback holds; also called after an error, where other ranks may be gone."""


Factory = TypeVar("Factory", bound=Callable[[], Callback])


def register_callback(name: str) -> Callable[[Factory], Factory]:
    """Register a subclass of `Callback`, or a function that returns one, under the name for ``train.callbacks``.

    It is called without arguments on every rank.
    """
    return CALLBACKS.register(name)


class Callbacks(Callback):
    """Calls several callbacks, in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._all = tuple(callbacks)

    def on_start(self, start: RunStart) -> None:
        for callback in self._all:
            callback.on_start(start)

    def before_step(self, step: int) -> None:
        for callback in self._all:
            callback.before_step(step)

    def on_phase(self, phase: Phase, step: int) -> None:
        for callback in self._all:
            callback.on_phase(phase, step)

    def after_step(self, report: StepReport) -> None:
        for callback in self._all:
            callback.after_step(report)

    def on_rollback(self, step: int, back: int, skipped_samples: int) -> None:
        for callback in self._all:
            callback.on_rollback(step, back, skipped_samples)

    def on_evaluate(self, step: int, name: str, loss: float) -> None:
        for callback in self._all:
            callback.on_evaluate(step, name, loss)

    def on_checkpoint(self, report: SaveReport) -> None:
        for callback in self._all:
            callback.on_checkpoint(report)

    def on_end(self, end: RunEnd) -> None:
        for callback in self._all:
            callback.on_end(end)

    def close(self) -> None:
        with ExitStack() as stack:  # all are closed, even where one raises
            for callback in self._all:
                stack.callback(callback.close)
