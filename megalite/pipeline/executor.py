"""The pipeline executor: runs a stream of instructions on one rank, in the order of the stream."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import reduce
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
    ReduceGradients,
    Send,
    SendActivation,
    SendGradient,
)
from megalite.pipeline.p2p import Channel, PendingReceive
from megalite.pipeline.stage_io import Edge, StageOutput, gradient_edge
from megalite.pipeline.timeline.spans import Span
from megalite.tensor_parallel.weight_grad_store import WeightGradStore


class StageEngine(Protocol):
    """The interface of the engine that holds the parameters of a rank's stages.

    A microbatch is opaque here: the executor passes it whole to the stages, which agree with the data on its content.
    """

    def forward(self, stage: int, inputs: dict[str, Tensor], microbatch: Any) -> StageOutput:
        """Run a stage on a microbatch; `inputs` are the activations of the previous stage, none for the first."""
        ...

    def backward(self, stage: int, scalar: Tensor, *, last: bool) -> None:
        """Backpropagate from a stage's scalar into the parameters' gradients, with the loss scale if there is one.

        `last` says that no other backward of the stage follows in the step: an engine may reduce its gradients now,
        unless weight gradients are deferred.
        """
        ...

    def defer_weight_grads(self, stage: int) -> AbstractContextManager[WeightGradStore]:
        """Defer the weight gradients of the stage's backwards inside the context."""
        ...

    def compute_weight_grads(self, stage: int, store: WeightGradStore) -> None:
        """Compute deferred weight gradients of a stage and accumulate them."""
        ...

    def reduce_gradients(self, stage: int) -> bool:
        """Reduce the stage's complete gradients over the data ranks; return whether that was left to do now."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of one stream: the losses of this rank's stages, summed by name over microbatches and stages, and, if
    recorded, when each forward and backward ran, in seconds since the start of the stream."""

    losses: Mapping[str, Tensor]
    spans: tuple[Span, ...] = ()


class _InjectGradients(torch.autograd.Function):
    """Return a scalar whose gradients with respect to `outputs` are `gradients`, for any factor on the scalar.

    Engines backpropagate from a scalar, but a stage before the last has the gradients of its outputs instead. These
    include the loss scale already, so the loss scale that the engine multiplies the scalar by must have no effect.
    """

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def _scalar(output: StageOutput, gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the scalar to backpropagate from: the sum of a stage's losses, with the gradients of its activations."""
    terms = list(output.losses.values())
    if gradients:
        outputs = (output.activations[name] for name in gradients)
        terms.append(_InjectGradients.apply([*gradients.values()], *outputs))  # pyright: ignore[reportArgumentType]
    return reduce(torch.add, terms)


class PipelineExecutor:
    """Executes streams with the stages of `engine` and the messages of `links`."""

    def __init__(
        self,
        engine: StageEngine,
        links: Links,
        *,
        placement: Placement,
        rank: int,
        edges: Mapping[int, Edge],
        device: torch.device,
        first_trained: int = 0,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Build the executor of pipeline rank `rank`; `on_progress` is called after every instruction.

        `edges` describe the tensors between stages, by the sending stage. `first_trained` is the first stage with a
        trained parameter. The stages before it compute no backward: they receive zeros as gradients, so that every
        message of the schedule is sent.
        """
        self.on_progress, self.compute_timer, self.first_trained = on_progress, compute_timer(device), first_trained
        self.engine, self.placement, self.rank, self.device = engine, placement, rank, device
        self.edges = edges
        self.incoming = {end: Channel(link, device) for end, link in links.incoming.items()}
        self.outgoing = {end: Channel(link, device) for end, link in links.outgoing.items()}

    def run(self, stream: Sequence[Instruction], microbatches: Sequence[Any], *, record: bool = False) -> StepResult:
        """Execute `stream` over `microbatches`, which the stages' forwards take.

        With `record` the device is synchronised around every forward and backward to measure it, which costs time.
        """
        return _Run(self, microbatches, record).execute(stream)


Key = tuple[int, int]
"""A stage and a microbatch."""


class _Run:
    """The state of one execution: tensors that were received or computed and are still needed."""

    def __init__(self, executor: PipelineExecutor, microbatches: Sequence[Any], record: bool) -> None:
        self.executor, self.microbatches, self.record = executor, microbatches, record
        self.placement = executor.placement
        self.last_stage = executor.placement.num_stages - 1
        self.receiving: dict[Receive, PendingReceive] = {}
        self.unsent_outputs: dict[Key, dict[str, Tensor]] = {}
        """Activations that were not yet passed to the next stage."""
        self.inputs: dict[Key, dict[str, Tensor]] = {}
        """Inputs whose gradients were not yet passed to the previous stage."""
        self.outputs: dict[Key, StageOutput] = {}
        """Outputs with their autograd graph, until their backward."""
        self.weight_grads: dict[Key, WeightGradStore] = {}
        self.backwards_left = Counter[int]()
        """The number of backwards that each stage still has to run."""
        self.losses: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.spans: list[Span] = []
        self.start = time.perf_counter()

    def execute(self, stream: Sequence[Instruction]) -> StepResult:
        self.backwards_left.update(i.stage for i in stream if isinstance(i, Backward | BackwardInput))
        with torch.set_grad_enabled(bool(self.backwards_left)):
            for instruction in stream:
                self._execute(instruction)
                self.executor.on_progress()
        for channel in self.executor.outgoing.values():
            channel.flush()
        unused = (self.receiving, self.unsent_outputs, self.inputs, self.outputs, self.weight_grads)
        assert not any(unused), unused
        losses = {name: torch.stack(terms).sum() for name, terms in self.losses.items()}
        return StepResult(losses, tuple(self.spans))

    def _execute(self, instruction: Instruction) -> None:
        key = (instruction.stage, instruction.microbatch)
        match instruction:
            case Receive():
                self.receiving[instruction] = self._channel(instruction).receive(self._edge(instruction))
            case SendActivation():
                self._channel(instruction).send(self.unsent_outputs.pop(key), self._edge(instruction))
            case SendGradient():
                self._channel(instruction).send(self._input_gradients(key), self._edge(instruction))
            case Forward():
                self._forward(instruction)
            case Backward() | BackwardInput():
                self._backward(instruction)
            case BackwardWeight():
                with self._timed(instruction):
                    self.executor.engine.compute_weight_grads(instruction.stage, self.weight_grads.pop(key))
            case ReduceGradients():
                self._reduce(instruction)
            case _:
                raise NotImplementedError(f"the executor cannot run {instruction}")

    def _channel(self, message: Send | Receive) -> Channel:
        ends = self.executor.outgoing if isinstance(message, Send) else self.executor.incoming
        return ends[message.kind, self.placement.rank_of(message.counterpart.stage)]

    def _edge(self, message: Send | Receive) -> Edge:
        """Return the tensors of a message; the lower one of its two stages sends the activations."""
        edge = self.executor.edges[min(message.stage, message.counterpart.stage)]
        return edge if message.kind == "activation" else gradient_edge(edge)

    def _forward(self, at: Forward) -> None:
        key = (at.stage, at.microbatch)
        inputs = self._stage_input(key)
        with self._timed(at):
            output = self.executor.engine.forward(at.stage, inputs, self.microbatches[at.microbatch])
            for name, loss in output.losses.items():
                self.losses[name].append(loss.detach())
            if at.stage < self.last_stage:
                self.unsent_outputs[key] = {name: tensor.detach() for name, tensor in output.activations.items()}
            if torch.is_grad_enabled():
                self.outputs[key] = output

    def _stage_input(self, key: Key) -> dict[str, Tensor]:
        """Return the activations of the previous stage, from this rank or another; none for the first stage."""
        stage, microbatch = key
        if stage == 0:
            return {}
        if self._is_local(stage - 1):
            inputs = self.unsent_outputs.pop((stage - 1, microbatch))
        else:
            inputs = self.receiving.pop(ReceiveActivation(*key)).wait()
        if torch.is_grad_enabled():
            for name in gradient_edge(self.executor.edges[stage - 1]):
                inputs[name].requires_grad_(stage > self.executor.first_trained)
            self.inputs[key] = inputs
        return inputs

    def _backward(self, at: Backward | BackwardInput) -> None:
        key, engine = (at.stage, at.microbatch), self.executor.engine
        gradients = self._output_gradients(key) if at.stage < self.last_stage else {}
        self.backwards_left[at.stage] -= 1
        last = not self.backwards_left[at.stage]
        if at.stage < self.executor.first_trained:
            del self.outputs[key]
            self.weight_grads |= {key: WeightGradStore()} if isinstance(at, BackwardInput) else {}
            return
        with self._timed(at):
            scalar = _scalar(self.outputs.pop(key), gradients)
            if isinstance(at, Backward):
                engine.backward(at.stage, scalar, last=last)
            else:
                with engine.defer_weight_grads(at.stage) as self.weight_grads[key]:
                    engine.backward(at.stage, scalar, last=last)

    def _reduce(self, at: ReduceGradients) -> None:
        started = self._clock() if self.record else 0.0
        if self.executor.engine.reduce_gradients(at.stage) and self.record:
            self.spans.append(Span(self.executor.rank, at, started, self._clock()))

    def _output_gradients(self, key: Key) -> dict[str, Tensor]:
        """Return the gradients of a stage's activations: those of the next stage's inputs."""
        stage, microbatch = key
        if self._is_local(stage + 1):
            return self._input_gradients((stage + 1, microbatch))
        return self.receiving.pop(ReceiveGradient(*key)).wait()

    def _input_gradients(self, key: Key) -> dict[str, Tensor]:
        """Return the gradients of a stage's inputs; zero for an input that the stage did not use or that needs none."""
        inputs = self.inputs.pop(key)
        used = {name: inputs[name] for name in gradient_edge(self.executor.edges[key[0] - 1])}
        return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in used.items()}

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
