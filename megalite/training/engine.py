"""Engine: what the trainer needs of a sharding engine.

`megalite.fsdp.engine.TorchEngine` is one, on torch's FSDP2, and `megalite.zero.engine.ZeroEngine` one on DeepSpeed.

An engine holds the stages of a rank, accumulates gradients over the microbatches of a step, reduces them over the data
axis, clips them, and updates the weights. The pipeline executor drives it through `StageEngine`, the trainer through
`Engine`, and checkpoints and the parity check through `EngineState`. `megalite.training.build.build_engine` decides
which engine a run has.

How and when an engine shards is its own affair. These are the points where it can act:

| point | an engine may |
|---|---|
| construction | shard the stages' parameters, and keep fp32 master weights of the trained ones |
| `forward`, `backward` | gather and release a stage's weights; reduce its gradients per microbatch, or at the last |
| the end of `accumulate` | add the gradients of replicated and tied parameters, and reduce what is not reduced yet |
| `step` | clip by the global norm, skip where a gradient is not finite, update, and gather the weights |

`megalite.model.gradients` has what every engine does with the gradients that several ranks share. Whatever its layout,
an engine shows its state as `Fragment`s, flat ranges of local parameters, which checkpoints map to global
tensors. So a checkpoint of one engine can be resumed by another.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from megalite.checkpoint.fragments import Fragment, TensorSource
from megalite.model.stage import Stage
from megalite.optim.outcome import StepOutcome
from megalite.pipeline.executor import StageEngine


class EngineState(Protocol):
    """The state of an engine, for checkpoints: weights and optimizer state as fragments, and JSON values."""

    def fragments(self) -> Iterator[Fragment]:
        """Yield the fragments that this rank holds, of trained parameters with the optimizer's declared state.

        Over all ranks they cover every element of the model. A frozen parameter has its ``weight`` alone.
        """
        ...

    def gradients(self) -> Iterator[Fragment]:
        """Yield the fragments of trained parameters with their reduced ``gradient``, before clipping.

        Only between the end of `Engine.accumulate` and `Engine.step`.
        """
        ...

    def restore(self, source: TensorSource, scalar_state: Mapping[str, Any]) -> None:
        """Restore master weights, optimizer state and scalar state; frozen weights stay as the stages have them."""
        ...

    def restore_weights(self, source: TensorSource) -> None:
        """Restore the master weights of trained parameters."""
        ...

    def scalar_state(self) -> dict[str, Any]:
        """Return the state without tensors: ``updates``, ``loss_scale`` and ``scheduler``."""
        ...

    def preserve_loss_scale(self) -> AbstractContextManager[None]:
        """Undo changes of the loss scale by a step inside the context."""
        ...


class Engine(StageEngine, Protocol):
    """A sharding engine over this rank's stages. Methods are collective unless they say otherwise.

    One optimizer step is ``with engine.accumulate(): <forwards and backwards>`` and then ``engine.step()``. A stage
    without trained parameters has forwards and no backwards; then it must take part in reduction and norm all the same.
    """

    @property
    def stages(self) -> Mapping[int, Stage]:
        """This rank's stages by their index; a frozen parameter does not require a gradient."""
        ...

    @property
    def state(self) -> EngineState: ...

    def local_parameters(self, stage: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """Yield this rank's part of each parameter of a stage: name in the stage, weight, and gradient if there is one.

        Not collective. An engine that shards while it accumulates yields shares.
        """
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and activations."""
        ...

    @property
    def learning_rate(self) -> float:
        """The rate of the last step, or of the next one where the engine has a scheduler of its own. Not collective."""
        ...

    def accumulate(self) -> AbstractContextManager[None]:
        """Accumulate the gradients of one step; at the end of the context they are reduced."""
        ...

    def poison_gradients(self) -> None:
        """Set a gradient to inf inside `accumulate`, after the backwards, so that every rank skips the update."""
        ...

    def step(self, learning_rate: float | None) -> StepOutcome:
        """Clip the gradients and update, at `learning_rate` times the factor of each parameter group.

        With None the engine's own scheduler sets the rate. Where any rank has a gradient that is not finite, every rank
        skips the update: weights and optimizer state do not change, and the gradients are dropped.
        """
        ...

    def on_update_progress(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `step` has updated some of the parameters. Not collective."""
        ...

    def sync_model_params_from_master(self) -> None:
        """Copy the master weights into the parameters, after `EngineState.restore`."""
        ...

    def close(self) -> None:
        """Remove the engine's hooks from the stages. Not collective."""
        ...
