"""The pipeline executor: runs a stream of instructions on one rank, in the order of the stream."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megalite.parallel.mesh import Links
from megalite.parallel.placement import Placement
from megalite.pipeline.compute_timer import compute_timer
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
    """The fields that the executor reads of a microbatch (`megalite.model.microbatch.Microbatch`); it passes `packing`
    and `dropout` on to the engine."""

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
    """The interface of the engine that holds the parameters of a rank's stages."""

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
        """Backpropagate from a scalar into the parameters' gradients, with the loss scale if there is one."""
        ...

    def defer_weight_grads(self, stage: int) -> AbstractContextManager[WeightGradStore]:
        """Defer the weight gradients of the stage's backwards inside the context."""
        ...

    def compute_weight_grads(self, store: WeightGradStore) -> None:
        """Compute deferred weight gradients and accumulate them."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of one stream: the loss over its microbatches on the last stage (None on the others), and, if
    recorded, when each forward and backward ran, in seconds since the start of the stream."""

    loss: Tensor | None
    spans: tuple[Span, ...] = ()


class _InjectGradient(torch.autograd.Function):
    """Return a scalar whose gradient with respect to `output` is `gradient`, for any factor on the scalar.

    Engines backpropagate from a scalar, but a middle stage has no loss, only the gradient of its output. That gradient
    includes the loss scale already, so the loss scale that the engine multiplies the scalar by must have no effect.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


class PipelineExecutor:
    """Executes streams with the stages of `engine` and the messages of `links`; all activations have one shape."""

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
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Build the executor of pipeline rank `rank`; `on_progress` is called after every instruction."""
        self.on_progress, self.compute_timer = on_progress, compute_timer(device)
        self.engine, self.placement, self.rank, self.device = engine, placement, rank, device
        self.incoming = {end: Channel(link, activation_shape, dtype, device) for end, link in links.incoming.items()}
        self.outgoing = {end: Channel(link, activation_shape, dtype, device) for end, link in links.outgoing.items()}

    def run(
        self, stream: Sequence[Instruction], microbatches: Sequence[PipelineInput], *, record: bool = False
    ) -> StepResult:
        """Execute `stream` over `microbatches`; the last stage divides unweighted losses by their number.

        With `record` the device is synchronised around every forward and backward to measure it, which costs time.
        """
        return _Run(self, microbatches, record).execute(stream)


Key = tuple[int, int]
"""A stage and a microbatch."""


class _Run:
    """The state of one execution: tensors that were received or computed and are still needed."""

    def __init__(self, executor: PipelineExecutor, microbatches: Sequence[PipelineInput], record: bool) -> None:
        self.executor, self.microbatches, self.record = executor, microbatches, record
        self.placement = executor.placement
        self.last_stage = executor.placement.num_stages - 1
        self.receiving: dict[Receive, PendingReceive] = {}
        self.unsent_outputs: dict[Key, Tensor] = {}
        """Outputs that were not yet passed to the next stage."""
        self.inputs: dict[Key, Tensor] = {}
        """Inputs whose gradient was not yet passed to the previous stage."""
        self.outputs: dict[Key, Tensor] = {}
        """Outputs with their autograd graph, until their backward."""
        self.weight_grads: dict[Key, WeightGradStore] = {}
        self.losses: list[Tensor] = []
        self.spans: list[Span] = []
        self.start = time.perf_counter()

    def execute(self, stream: Sequence[Instruction]) -> StepResult:
        trains = any(isinstance(instruction, Backward | BackwardInput) for instruction in stream)
        with torch.set_grad_enabled(trains):
            for instruction in stream:
                self._execute(instruction)
                self.executor.on_progress()
        for channel in self.executor.outgoing.values():
            channel.flush()
        unused = (self.receiving, self.unsent_outputs, self.inputs, self.outputs, self.weight_grads)
        assert not any(unused), unused
        loss = torch.stack(self.losses).sum() if self.losses else None
        return StepResult(loss, tuple(self.spans))

    def _execute(self, instruction: Instruction) -> None:
        key = (instruction.stage, instruction.microbatch)
        match instruction:
            case Receive():
                self.receiving[instruction] = self._channel(instruction).receive()
            case SendActivation():
                self._channel(instruction).send(self.unsent_outputs.pop(key))
            case SendGradient():
                self._channel(instruction).send(self._input_gradient(key))
            case Forward():
                self._forward(instruction)
            case Backward() | BackwardInput():
                self._backward(instruction)
            case BackwardWeight():
                with self._timed(instruction):
                    self.executor.engine.compute_weight_grads(self.weight_grads.pop(key))
            case _:
                raise NotImplementedError(f"the executor cannot run {instruction}")

    def _channel(self, message: Send | Receive) -> Channel:
        ends = self.executor.outgoing if isinstance(message, Send) else self.executor.incoming
        return ends[message.kind, self.placement.rank_of(message.counterpart.stage)]

    def _forward(self, at: Forward) -> None:
        key, batch = (at.stage, at.microbatch), self.microbatches[at.microbatch]
        inputs = self._stage_input(key)
        with self._timed(at):
            output = self.executor.engine.forward(
                at.stage, inputs, batch.targets, batch.packing, batch.loss_weights, batch.dropout
            )
            if at.stage < self.last_stage:
                self.unsent_outputs[key] = output.detach()
            else:
                if batch.loss_weights is None:
                    output = output / len(self.microbatches)
                self.losses.append(output.detach())
            if torch.is_grad_enabled():
                self.outputs[key] = output

    def _stage_input(self, key: Key) -> Tensor:
        """Return the input of a stage: tokens, or the output of the previous stage, from this rank or another."""
        stage, microbatch = key
        if stage == 0:
            ids = self.microbatches[microbatch].ids
            assert ids is not None
            return ids
        if self._is_local(stage - 1):
            inputs = self.unsent_outputs.pop((stage - 1, microbatch))
        else:
            inputs = self.receiving.pop(ReceiveActivation(*key)).wait()
        if torch.is_grad_enabled():
            self.inputs[key] = inputs.requires_grad_()
        return inputs

    def _backward(self, at: Backward | BackwardInput) -> None:
        key, engine = (at.stage, at.microbatch), self.executor.engine
        scalar = self.outputs.pop(key)
        gradient = self._output_gradient(key) if at.stage < self.last_stage else None
        with self._timed(at):
            if gradient is not None:
                scalar: Tensor = _InjectGradient.apply(scalar, gradient)  # pyright: ignore[reportAssignmentType]
            if isinstance(at, Backward):
                engine.backward(scalar)
            else:
                with engine.defer_weight_grads(at.stage) as self.weight_grads[key]:
                    engine.backward(scalar)

    def _output_gradient(self, key: Key) -> Tensor:
        """Return the gradient of a stage's output: the gradient of the next stage's input."""
        stage, microbatch = key
        if self._is_local(stage + 1):
            return self._input_gradient((stage + 1, microbatch))
        return self.receiving.pop(ReceiveGradient(*key)).wait()

    def _input_gradient(self, key: Key) -> Tensor:
        gradient = self.inputs.pop(key).grad
        assert gradient is not None
        return gradient

    def _is_local(self, stage: int) -> bool:
        return self.placement.rank_of(stage) == self.executor.rank

    @contextmanager
    def _timed(self, at: Instruction) -> Iterator[None]:
        """Time the computation of an instruction, after its inputs have arrived."""
        with self.executor.compute_timer.measured():
            started = self._clock() if self.record else 0.0
            yield
            if self.record:
                self.spans.append(Span(self.executor.rank, at, started, self._clock()))

    def _clock(self) -> float:
        if self.executor.device.type == "cuda":
            torch.cuda.synchronize(self.executor.device)
        return time.perf_counter() - self.start
