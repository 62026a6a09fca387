"""Runs an instruction stream on one rank. It knows no schedule: what the stream says is what happens, in that order."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megalite.distributed import Links
from megalite.model.dropout import DropoutStreams
from megalite.model.packing import PackedDocuments
from megalite.pipeline.instructions import (
    Backward,
    Forward,
    Instruction,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
)
from megalite.pipeline.p2p import Channel, PendingReceive
from megalite.pipeline.timeline import Span


class StageEngine(Protocol):
    """What the executor asks of the thing that holds the stages' parameters."""

    def forward(
        self,
        stage: int,
        inputs: Tensor,
        targets: Tensor | None,
        packing: PackedDocuments | None,
        loss_weights: Tensor | None,
        dropout: DropoutStreams | None,
    ) -> Tensor: ...

    def backward(self, scalar: Tensor) -> None:
        """Differentiate a scalar, with the loss scale where there is one, into the parameters' gradients."""
        ...


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Token ids and targets ``[B, S]``, int64; each is needed at one end of the pipeline only, and None elsewhere.

    With `loss_weights` ``[B, S]``, fp32, the losses of a step are the sum over its tokens, each times its weight;
    without, the mean. `packing` says on every stage where documents begin, and `dropout` what is dropped.
    """

    ids: Tensor | None
    targets: Tensor | None
    packing: PackedDocuments | None = None
    loss_weights: Tensor | None = None
    dropout: DropoutStreams | None = None


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
        rank: int,
        num_stages: int,
        activation_shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.engine, self.rank, self.num_stages, self.device = engine, rank, num_stages, device
        ends = ("activation_in", "activation_out", "gradient_in", "gradient_out")
        self._channels = {
            end: Channel(link, activation_shape, dtype, device) for end in ends if (link := getattr(links, end))
        }

    def run(
        self, stream: Sequence[Instruction], microbatches: Sequence[Microbatch], *, record: bool = False
    ) -> StepResult:
        """Execute `stream` over `microbatches`, whose count the last stage divides unweighted losses by.

        With `record` the device is waited for around every forward and backward: true times, at some cost.
        """
        return _Run(self, microbatches, record).execute(stream)


class _Run:
    """The state of one stream under way: what was received and computed and is not used up yet."""

    def __init__(self, executor: PipelineExecutor, microbatches: Sequence[Microbatch], record: bool) -> None:
        self.executor, self.microbatches, self.record = executor, microbatches, record
        self.channels: Mapping[str, Channel] = executor._channels
        self.receiving: dict[tuple[type[Instruction], int, int], PendingReceive] = {}
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.losses: list[Tensor] = []
        self.spans: list[Span] = []
        self.began = time.perf_counter()

    def execute(self, stream: Sequence[Instruction]) -> StepResult:
        trains = any(isinstance(instruction, Backward) for instruction in stream)
        with torch.set_grad_enabled(trains):
            for instruction in stream:
                self._execute(instruction)
        for channel in self.channels.values():
            channel.flush()
        assert not self.receiving
        loss = torch.stack(self.losses).sum() if self.losses else None
        return StepResult(loss, tuple(self.spans))

    def _execute(self, instruction: Instruction) -> None:
        key = (instruction.stage, instruction.microbatch)
        match instruction:
            case ReceiveActivation():
                self.receiving[ReceiveActivation, *key] = self.channels["activation_in"].receive()
            case ReceiveGradient():
                self.receiving[ReceiveGradient, *key] = self.channels["gradient_in"].receive()
            case Forward():
                self._forward(instruction)
            case SendActivation():
                output = self.outputs[key]
                self.channels["activation_out"].send(output)
                if not output.requires_grad:  # evaluation: nothing comes back for it
                    del self.outputs[key]
            case Backward():
                self._backward(instruction)
            case SendGradient():
                gradient = self.inputs.pop(key).grad
                assert gradient is not None
                self.channels["gradient_out"].send(gradient)
            case _:
                raise NotImplementedError(f"no way to execute {instruction}")

    def _forward(self, at: Forward) -> None:
        key, batch = (at.stage, at.microbatch), self.microbatches[at.microbatch]
        if at.stage == 0:
            assert batch.ids is not None
            inputs = batch.ids
        else:
            inputs = self.receiving.pop((ReceiveActivation, *key)).wait()
            if torch.is_grad_enabled():
                self.inputs[key] = inputs.requires_grad_()
        started = self._clock()
        output = self.executor.engine.forward(
            at.stage, inputs, batch.targets, batch.packing, batch.loss_weights, batch.dropout
        )
        if at.stage == self.executor.num_stages - 1:
            if batch.loss_weights is None:
                output = output / len(self.microbatches)
            self.losses.append(output.detach())
            if not output.requires_grad:
                self._note(at, started)
                return
        self.outputs[key] = output
        self._note(at, started)

    def _backward(self, at: Backward) -> None:
        key = (at.stage, at.microbatch)
        output = self.outputs.pop(key)
        if at.stage == self.executor.num_stages - 1:
            started = self._clock()
            self.executor.engine.backward(output)
        else:
            gradient = self.receiving.pop((ReceiveGradient, *key)).wait()
            started = self._clock()
            scalar: Tensor = _BackwardFrom.apply(output, gradient)  # pyright: ignore[reportAssignmentType]
            self.executor.engine.backward(scalar)
        self._note(at, started)

    def _clock(self) -> float:
        if not self.record:
            return 0.0
        if self.executor.device.type == "cuda":
            torch.cuda.synchronize(self.executor.device)
        return time.perf_counter() - self.began

    def _note(self, at: Instruction, started: float) -> None:
        if self.record:
            self.spans.append(Span(self.executor.rank, at, started, self._clock()))
