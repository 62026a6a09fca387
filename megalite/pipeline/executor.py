"""Runs an instruction stream on one rank. It knows no schedule: what the stream says is what happens, in that order."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megalite.parallel.mesh import Links
from megalite.parallel.placement import Placement
from megalite.pipeline.compute_timer import own_time
from megalite.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    Receive,
    ReceiveActivation,
    ReceiveGradient,
    Send,
    SendActivation,
    SendGradient,
)
from megalite.pipeline.p2p import Channel, PendingReceive
from megalite.pipeline.timeline.spans import Span
from megalite.tensor_parallel.weight_grad_store import WeightGradStore


class PipelineInput(Protocol):
    """What the executor reads of a microbatch, `megalite.model.microbatch.Microbatch`; of `packing` and `dropout` it
    knows nothing, and hands them on."""

    @property
    def ids(self) -> Tensor | None: ...

    @property
    def targets(self) -> Tensor | None: ...

    @property
    def packing(self) -> Any: ...

    @property
    def loss_weights(self) -> Tensor | None: ...

    @property
    def dropout(self) -> Any: ...


class StageEngine(Protocol):
    """What the executor asks of the thing that holds the stages' parameters."""

    def forward(
        self,
        stage: int,
        inputs: Tensor,
        targets: Tensor | None,
        packing: Any,
        loss_weights: Tensor | None,
        dropout: Any,
    ) -> Tensor: ...

    def backward(self, scalar: Tensor) -> None:
        """Differentiate a scalar, with the loss scale where there is one, into the parameters' gradients."""
        ...

    def defer_weight_grads(self, stage: int) -> AbstractContextManager[WeightGradStore]:
        """While it is open, a backward of the stage puts its weight gradients off."""
        ...

    def compute_weight_grads(self, products: WeightGradStore) -> None:
        """Compute weight gradients that were put off, and add them to the others."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one stream leaves behind: the loss over its microbatches on the last stage (None on the others), and
    when each forward and backward ran, in seconds since the stream began, if it was asked for."""

    loss: Tensor | None
    spans: tuple[Span, ...] = ()


class _BackwardFrom(torch.autograd.Function):
    """A scalar whose derivative by `output` is `gradient`, whatever it is multiplied by on the way.

    A stage in the middle has no loss, only the gradient of its output, and engines differentiate scalars. The
    gradient arrives with the loss scale in it; the scale that an engine puts on this scalar must not count again.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


class PipelineExecutor:
    """Executes streams over `engine`, with the messages of `links`, for activations of one shape and precision."""

    def __init__(
        self,
        engine: StageEngine,
        links: Links,
        *,
        placement: Placement,
        rank: int,
        activation_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        """Build the executor of pipeline rank `rank`; `moved` is called after every instruction."""
        self.moved, self.own_time = moved, own_time(device)
        self.engine, self.placement, self.rank, self.device = engine, placement, rank, device
        self.incoming = {end: Channel(link, activation_shape, dtype, device) for end, link in links.incoming.items()}
        self.outgoing = {end: Channel(link, activation_shape, dtype, device) for end, link in links.outgoing.items()}

    def run(
        self, stream: Sequence[Instruction], microbatches: Sequence[PipelineInput], *, record: bool = False
    ) -> StepResult:
        """Execute `stream` over `microbatches`, whose count the last stage divides unweighted losses by.

        With `record` the device is waited for around every forward and backward: true times, at some cost.
        """
        return _Run(self, microbatches, record).execute(stream)


Key = tuple[int, int]
"""A stage and a microbatch."""


class _Run:
    """The state of one stream under way: what was received and computed and is not used up yet."""

    def __init__(self, executor: PipelineExecutor, microbatches: Sequence[PipelineInput], record: bool) -> None:
        self.executor, self.microbatches, self.record = executor, microbatches, record
        self.placement = executor.placement
        self.last_stage = executor.placement.num_stages - 1
        self.receiving: dict[Receive, PendingReceive] = {}
        self.passed_on: dict[Key, Tensor] = {}
        """Outputs that the next stage has not got yet."""
        self.inputs: dict[Key, Tensor] = {}
        """Inputs whose gradient the stage before has not got yet."""
        self.outputs: dict[Key, Tensor] = {}
        """Outputs, with their graph, that wait for their backward."""
        self.deferred: dict[Key, WeightGradStore] = {}
        self.losses: list[Tensor] = []
        self.spans: list[Span] = []
        self.began = time.perf_counter()

    def execute(self, stream: Sequence[Instruction]) -> StepResult:
        trains = any(isinstance(instruction, Backward | BackwardInput) for instruction in stream)
        with torch.set_grad_enabled(trains):
            for instruction in stream:
                self._execute(instruction)
                self.executor.moved()
        for channel in self.executor.outgoing.values():
            channel.flush()
        left = (self.receiving, self.passed_on, self.inputs, self.outputs, self.deferred)
        assert not any(left), left
        loss = torch.stack(self.losses).sum() if self.losses else None
        return StepResult(loss, tuple(self.spans))

    def _execute(self, instruction: Instruction) -> None:
        key = (instruction.stage, instruction.microbatch)
        match instruction:
            case Receive():
                self.receiving[instruction] = self._channel(instruction).receive()
            case SendActivation():
                self._channel(instruction).send(self.passed_on.pop(key))
            case SendGradient():
                self._channel(instruction).send(self._input_gradient(key))
            case Forward():
                self._forward(instruction)
            case Backward() | BackwardInput():
                self._backward(instruction)
            case BackwardWeight():
                with self._measured(instruction):
                    self.executor.engine.compute_weight_grads(self.deferred.pop(key))
            case _:
                raise NotImplementedError(f"no way to execute {instruction}")

    def _channel(self, message: Send | Receive) -> Channel:
        ends = self.executor.outgoing if isinstance(message, Send) else self.executor.incoming
        return ends[message.kind, self.placement.rank_of(message.counterpart.stage)]

    def _forward(self, at: Forward) -> None:
        key, batch = (at.stage, at.microbatch), self.microbatches[at.microbatch]
        inputs = self._stage_input(key)
        with self._measured(at):
            output = self.executor.engine.forward(
                at.stage, inputs, batch.targets, batch.packing, batch.loss_weights, batch.dropout
            )
            if at.stage < self.last_stage:
                self.passed_on[key] = output.detach()
            else:
                if batch.loss_weights is None:
                    output = output / len(self.microbatches)
                self.losses.append(output.detach())
            if torch.is_grad_enabled():
                self.outputs[key] = output

    def _stage_input(self, key: Key) -> Tensor:
        """Return what a stage reads: tokens, or what the stage before made, here or on another rank."""
        stage, microbatch = key
        if stage == 0:
            ids = self.microbatches[microbatch].ids
            assert ids is not None
            return ids
        if self._is_here(stage - 1):
            inputs = self.passed_on.pop((stage - 1, microbatch))
        else:
            inputs = self.receiving.pop(ReceiveActivation(*key)).wait()
        if torch.is_grad_enabled():
            self.inputs[key] = inputs.requires_grad_()
        return inputs

    def _backward(self, at: Backward | BackwardInput) -> None:
        key, engine = (at.stage, at.microbatch), self.executor.engine
        scalar = self.outputs.pop(key)
        gradient = self._output_gradient(key) if at.stage < self.last_stage else None
        with self._measured(at):
            if gradient is not None:
                scalar: Tensor = _BackwardFrom.apply(scalar, gradient)  # pyright: ignore[reportAssignmentType]
            if isinstance(at, Backward):
                engine.backward(scalar)
            else:
                with engine.defer_weight_grads(at.stage) as self.deferred[key]:
                    engine.backward(scalar)

    def _output_gradient(self, key: Key) -> Tensor:
        """Return the gradient of a stage's output: what the stage after found for its input."""
        stage, microbatch = key
        if self._is_here(stage + 1):
            return self._input_gradient((stage + 1, microbatch))
        return self.receiving.pop(ReceiveGradient(*key)).wait()

    def _input_gradient(self, key: Key) -> Tensor:
        gradient = self.inputs.pop(key).grad
        assert gradient is not None
        return gradient

    def _is_here(self, stage: int) -> bool:
        return self.placement.rank_of(stage) == self.executor.rank

    @contextmanager
    def _measured(self, at: Instruction) -> Iterator[None]:
        """Stand around what an instruction computes, once what it waits for is there."""
        with self.executor.own_time.measured():
            started = self._clock() if self.record else 0.0
            yield
            if self.record:
                self.spans.append(Span(self.executor.rank, at, started, self._clock()))

    def _clock(self) -> float:
        if self.executor.device.type == "cuda":
            torch.cuda.synchronize(self.executor.device)
        return time.perf_counter() - self.began
