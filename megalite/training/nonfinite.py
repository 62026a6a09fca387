"""Guard against non-finite gradients: ends a run after too many skipped steps in a row, and names the first cause."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from megalite.errors import UserError
from megalite.model.stage import Stage
from megalite.parallel.json_collectives import gather_json
from megalite.parallel.mesh import Mesh
from megalite.training.engine import Engine

# The kinds of non-finite tensors, in the order of a step: the first one is the cause of the others.
_PARAMETER, _OUTPUT, _GRADIENT = range(3)


class NonFiniteGuard:
    """Counts the skipped steps in a row, and ends the run at `limit` of them.

    In the step that may reach the limit, every rank checks all parameters, outputs and gradients. Other steps have no
    checks and no cost.
    """

    def __init__(self, limit: int, engine: Engine, mesh: Mesh, run: Path) -> None:
        self.limit, self._engine, self._mesh, self._run = limit, engine, mesh, run
        self._in_a_row = 0
        self._first: list[Any] | None = None
        """[order, text] of the first tensor on this rank that was not finite in the checked step."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Check the forwards and backwards inside the context, which ends before `Engine.accumulate` does."""
        self._first = None
        if self._in_a_row < self.limit - 1:
            yield
            return
        self._check_parameters()
        with ExitStack() as hooks:
            for index, stage in self._engine.stages.items():
                self._check_outputs(index, stage, hooks)
            yield
        self._check_gradients()

    def update(self, step: int, *, skipped: bool, loss_scale: float | None) -> None:
        """Count a finished step; raise UserError on every rank if the limit is reached. Collective."""
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row < self.limit:
            return
        causes = [(*first, rank) for rank, first in enumerate(gather_json(self._first, self._mesh)) if first]
        cause = "every gradient of the last is finite on its rank, and their sum or its norm is not"
        if causes:
            _, text, rank = min(causes)
            at = self._mesh.layout.coordinate(rank)
            place = ", ".join(f"{axis} {at[axis]}" for axis in self._mesh.layout.names)
            cause = f"in the last, rank {rank} ({place}) was the first with a number that is not finite: {text}"
        fix = "Lower train.optimizer.lr or gradient_clipping"
        if loss_scale is not None:
            fix = f"The loss scale is {loss_scale:g}: lower fp16.loss_scale or fp16.initial_scale_power, raise"
            fix += " train.max_bad_steps where it is still coming down, lower train.optimizer.lr"
        raise UserError(
            f"train.max_bad_steps={self.limit} steps in a row, to step {step}, had a gradient that is not finite, and "
            f"were skipped; {cause}. {fix}, or look at what the step read: megalite inspect {self._run} --step {step}"
        )

    def _record(self, order: tuple[int, ...], text: Callable[[], str], tensor: Tensor) -> None:
        """Record a tensor that is not finite, if it is the first in the order of the step."""
        earlier = self._first is None or [*order] < self._first[0]
        if earlier and not bool(torch.isfinite(tensor.detach()).all()):
            self._first = [[*order], text()]

    def _check_parameters(self) -> None:
        for index in self._engine.stages:
            for number, (name, weight, _) in enumerate(self._engine.local_parameters(index)):
                text = f"parameter {name} of stage {index}"
                self._record((_PARAMETER, index, number), lambda t=text: t, weight)

    def _check_outputs(self, index: int, stage: Stage, hooks: ExitStack) -> None:
        seen = {"microbatch": -1, "outputs": 0}

        def begin(module: nn.Module, args: Any) -> None:
            seen.update(microbatch=seen["microbatch"] + 1, outputs=0)

        def check(name: str, output: Any) -> None:
            seen["outputs"] += 1
            at = seen["microbatch"]
            text = f"the output of {name or 'the stage'} in stage {index}, microbatch {at} (counted from 0)"
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self._record((_OUTPUT, at, index, seen["outputs"]), lambda: text, tensor)

        hooks.callback(stage.register_forward_pre_hook(begin).remove)
        for name, module in stage.named_modules():
            hook = module.register_forward_hook(lambda _module, _inputs, output, name=name: check(name, output))
            hooks.callback(hook.remove)

    def _check_gradients(self) -> None:
        """Check the gradients, from the loss to the input, which is the order in which a backward computes them."""
        for index in self._engine.stages:
            for number, (name, _, gradient) in enumerate(self._engine.local_parameters(index)):
                if gradient is not None:
                    text = f"the gradient of {name} of stage {index}"
                    self._record((_GRADIENT, -index, -number), lambda t=text: t, gradient)
