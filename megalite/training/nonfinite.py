"""Steps whose gradient is not finite: how many in a row a run bears, and who began it once it bears no more."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalite.errors import UserError
from megalite.model.stage import Stage
from megalite.parallel.json_collectives import gather_json
from megalite.parallel.mesh import Mesh

# What a rank has found, in the order in which a step comes by it: the smallest is the cause, the others follow from it.
_PARAMETER, _OUTPUT, _GRADIENT = range(3)


class BadSteps:
    """Counts the steps in a row that were skipped, and ends the run at `limit` of them.

    The step that would be the last one is watched on every rank: it costs a look at every parameter, output and
    gradient. No other step costs anything.
    """

    def __init__(self, limit: int, stages: Mapping[int, Stage], mesh: Mesh, run: Path) -> None:
        self.limit, self._stages, self._mesh, self._run = limit, stages, mesh, run
        self._in_a_row = 0
        self._first: list[Any] | None = None
        """[order, words] of the first tensor of this rank that was not finite in the step that was watched."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Stand around the forwards and backwards of a step, before its gradients are reduced."""
        self._first = None
        if self._in_a_row < self.limit - 1:
            yield
            return
        self._look_at_parameters()
        with ExitStack() as hooks:
            for index, stage in self._stages.items():
                self._look_at_outputs(index, stage, hooks)
            yield
        self._look_at_gradients()

    def count(self, step: int, *, skipped: bool, loss_scale: float | None) -> None:
        """Take note of a finished step; raise UserError, on every rank alike, where it was one too many. Collective."""
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row < self.limit:
            return
        found = [(*first, rank) for rank, first in enumerate(gather_json(self._first, self._mesh)) if first]
        cause = "every gradient of the last is finite on its rank, and their sum or its norm is not"
        if found:
            _, words, rank = min(found)
            at = self._mesh.layout.coordinate(rank)
            place = ", ".join(f"{axis} {at[axis]}" for axis in self._mesh.layout.names)
            cause = f"in the last, rank {rank} ({place}) was the first with a number that is not finite: {words}"
        fix = "Lower train.optimizer.lr or gradient_clipping"
        if loss_scale is not None:
            fix = f"The loss scale is {loss_scale:g}: lower fp16.loss_scale or fp16.initial_scale_power, raise"
            fix += " train.max_bad_steps where it is still coming down, lower train.optimizer.lr"
        raise UserError(
            f"train.max_bad_steps={self.limit} steps in a row, to step {step}, had a gradient that is not finite, and "
            f"were skipped; {cause}. {fix}, or look at what the step read: megalite inspect {self._run} --step {step}"
        )

    def _note(self, order: tuple[int, ...], words: Callable[[], str], tensor: Tensor) -> None:
        earlier = self._first is None or [*order] < self._first[0]
        if earlier and not bool(torch.isfinite(tensor.detach()).all()):
            self._first = [[*order], words()]

    def _look_at_parameters(self) -> None:
        for index, stage in self._stages.items():
            for place, placed in enumerate(stage.placed_parameters):
                # At ZeRO-3 a parameter at rest has this rank's share only.
                held = getattr(placed.parameter, "ds_tensor", placed.parameter)
                words = f"parameter {placed.name} of stage {index}"
                self._note((_PARAMETER, index, place), lambda w=words: w, held)

    def _look_at_outputs(self, index: int, stage: Stage, hooks: ExitStack) -> None:
        seen = {"microbatch": -1, "outputs": 0}

        def begin(module: nn.Module, args: Any) -> None:
            seen.update(microbatch=seen["microbatch"] + 1, outputs=0)

        def look(name: str, output: Any) -> None:
            seen["outputs"] += 1
            if isinstance(output, Tensor) and output.is_floating_point():
                at = seen["microbatch"]
                words = f"the output of {name or 'the stage'} in stage {index}, microbatch {at} (counted from 0)"
                self._note((_OUTPUT, at, index, seen["outputs"]), lambda: words, output)

        hooks.callback(stage.register_forward_pre_hook(begin).remove)
        for name, module in stage.named_modules():
            hook = module.register_forward_hook(lambda _module, _inputs, output, name=name: look(name, output))
            hooks.callback(hook.remove)

    def _look_at_gradients(self) -> None:
        """The gradient nearest the loss is the first that a backward computes."""
        for index, stage in self._stages.items():
            for place, placed in enumerate(stage.placed_parameters):
                if placed.parameter.grad is not None:
                    words = f"the gradient of {placed.name} of stage {index}"
                    self._note((_GRADIENT, -index, -place), lambda w=words: w, placed.parameter.grad)
