"""`megalite.train`: a run from Python, with callbacks."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megalite.config import RunConfig
from megalite.config.yaml12 import Dumper
from megalite.errors import USER_ERROR_STATUS, RunFailed, UserError
from megalite.launch import LaunchEnvironment, launch_environment, reserved_port
from megalite.monitoring.run_state import read_state
from megalite.planning.plan import Plan, prepare

if TYPE_CHECKING:
    from megalite.monitoring.callback import Callback


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended that did not fail."""

    folder: Path
    """The run's folder, with its metrics and checkpoints."""
    step: int
    """The last step that was done."""
    complete: bool
    """Whether that is `train.steps`."""
    stopped_by: str | None
    """What ended the run before, such as ``SIGTERM`` or ``train.stop_after=100``; None for a complete run."""


def train(
    run: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    *,
    callbacks: Sequence["Callback"] = (),
) -> RunResult:
    """Train the model of a run file, as the command ``megalite train`` does.

    Under a launcher such as torchrun this process becomes one of the ranks. Otherwise a run of one rank trains in this
    process, and a run of several starts their processes on this machine. `callbacks` are objects of this process. They
    observe the ranks that run in it, so that a run whose ranks are started here refuses them: name a registered
    callback in ``train.callbacks`` instead. Call it from the main thread.

    Args:
        run: the path of a run file, its content, or a loaded `RunConfig`.
        overrides: settings in place of the run file's, as ``["train.steps=10"]``.
        callbacks: called after megalite's own and those of ``train.callbacks``.

    Raises:
        UserError: for a mistake in the input; the message says how to correct it.
        RunFailed: where ranks that were started here failed.
    """
    environment = launch_environment(os.environ)
    with _run_file(run) as path:
        plan = prepare(path, overrides, environment.world_size if environment is not None else None)
        if environment is not None:
            _train_here(plan, environment, callbacks)
        elif plan.layout.world_size == 1:
            with reserved_port() as port:
                _train_here(plan, LaunchEnvironment(0, 1, 0, 1, "environment", "127.0.0.1", port), callbacks)
        else:
            _launch(plan, path, overrides, callbacks)
    return _result(plan)


@contextmanager
def _run_file(run: str | Path | Mapping[str, Any] | RunConfig) -> Iterator[Path]:
    """Yield the path of a run file; other forms of a run are written to a temporary one, which the ranks read."""
    if isinstance(run, str | Path):
        yield Path(run)
        return
    text = run.to_yaml() if isinstance(run, RunConfig) else yaml.dump(dict(run), Dumper=Dumper, sort_keys=False)
    with tempfile.TemporaryDirectory(prefix="megalite-run-") as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        yield path


def _train_here(plan: Plan, environment: LaunchEnvironment, callbacks: Sequence["Callback"]) -> None:
    """Train as a rank in this process."""
    from megalite.training.local_launch import state_writer
    from megalite.training.train import train as train_rank  # imports torch and DeepSpeed

    marker = state_writer(plan, lambda doing: None)
    with _environment(environment.variables()):
        try:
            train_rank(plan, environment, marker=marker, callbacks=callbacks)
        except Exception as error:
            marker.failed(str(error) or type(error).__name__)
            raise


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set the variables from which torch and DeepSpeed read a rank, and restore the environment afterwards."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _launch(plan: Plan, path: Path, overrides: Sequence[str], callbacks: Sequence["Callback"]) -> None:
    """Start the ranks in processes of their own."""
    from megalite.training.local_launch import check_before_launch, launch_ranks, state_writer

    ranks = plan.layout.world_size
    if callbacks:
        raise UserError(
            f"callbacks: {ranks} ranks are started in processes of their own, where objects of this process are not; "
            "register the callbacks in a module that plugins names, and name them in train.callbacks, or start this "
            f"script as the ranks: torchrun --nproc_per_node {ranks} SCRIPT.py"
        )
    if check_before_launch(plan) is not None:
        return
    failures: list[str] = []
    status = launch_ranks(plan, path, overrides, state_writer(plan, lambda doing: None), failures.append)
    if failures:
        raise (UserError if status == USER_ERROR_STATUS else RunFailed)(failures[-1])


def _result(plan: Plan) -> RunResult:
    folder, state = plan.config.run.dir, read_state(plan.config.run.dir)
    if state is None or state.step is None:
        raise RunFailed(f"{folder}: the run ended without a record of its last step; see {folder / 'logs'}")
    return RunResult(folder, state.step, state.state == "done", state.reason)
