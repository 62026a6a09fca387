"""The instructions of a pipeline schedule: compute, send, receive and reduce, as frozen dataclasses.

An instruction names only its stage and its microbatch, and no buffer, tag or rank. Its text is stage, code and
microbatch (``2F0``: stage 2 runs the forward of microbatch 0), which `parse` reads.

Messages have no tags. The k-th send from one rank to another matches the k-th receive posted there, where activations
and gradients are counted separately; so the order of the streams alone determines the matching. Two neighbouring stages
on one rank exchange no message: the executor passes the tensor on.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from megalite.parallel.placement import MessageKind, Placement


@dataclass(frozen=True, slots=True)
class Instruction:
    """One action of a pipeline stage on one microbatch.

    `stage` is the stage that runs it, in ``0..num_stages - 1``; a rank that holds several virtual stages runs the
    instructions of all of them.
    """

    stage: int
    microbatch: int
    code: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.stage}{self.code}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Compute(Instruction):
    """An instruction that keeps the device busy."""

    def required_receive(self, num_stages: int) -> "Receive | None":
        """Return the receive of this instruction's input, on any placement; None where it needs no other stage."""
        raise NotImplementedError

    def resulting_send(self, num_stages: int) -> "Send | None":
        """Return the send of this instruction's result, on any placement; None where no other stage needs it."""
        raise NotImplementedError

    def receive(self, placement: Placement) -> "Receive | None":
        """Return the receive that this instruction waits for; None where its input comes from the same rank."""
        receive = self.required_receive(placement.num_stages)
        return receive if receive and placement.crosses(receive.stage, receive.counterpart.stage) else None

    def send(self, placement: Placement) -> "Send | None":
        """Return the send of the result to another rank; None where the result stays on this rank."""
        send = self.resulting_send(placement.num_stages)
        return send if send and placement.crosses(send.stage, send.counterpart.stage) else None


@dataclass(frozen=True, slots=True)
class Send(Instruction):
    """Start to send a result of this stage to a neighbouring stage, without waiting for its arrival."""

    kind: ClassVar[MessageKind]

    @property
    def sources(self) -> tuple[Compute, ...]:
        """The compute instructions any of which computes the tensor that is sent."""
        raise NotImplementedError

    @property
    def counterpart(self) -> "Receive":
        """The receive on the neighbouring stage that matches this send."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Receive(Instruction):
    """Post the receive of a neighbouring stage's message; the compute instruction that needs it waits for it."""

    kind: ClassVar[MessageKind]

    @property
    def counterpart(self) -> Send:
        """The send on the neighbouring stage that matches this receive."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Forward(Compute):
    """Run the stage's layers on one microbatch. Roughly::

    x = {} if stage == 0 else wait(ReceiveActivation(stage, microbatch))
    y, losses = stage(x, microbatch)           # named activations; named losses, which any stage may have
    keep x, y and losses until Backward or BackwardInput(stage, microbatch)
    """

    code: ClassVar[str] = "F"

    def required_receive(self, num_stages: int) -> "ReceiveActivation | None":
        """Return the receive of the stage's input; None on the first stage, which reads tokens."""
        return ReceiveActivation(self.stage, self.microbatch) if self.stage > 0 else None

    def resulting_send(self, num_stages: int) -> "SendActivation | None":
        """Return the send of the stage's output; None on the last stage, which computes the loss."""
        return SendActivation(self.stage, self.microbatch) if self.stage < num_stages - 1 else None


@dataclass(frozen=True, slots=True)
class _GivesInputGradient(Compute):
    """The base of `Backward` and `BackwardInput`: from the output's gradient to the input's gradient."""

    def required_receive(self, num_stages: int) -> "ReceiveGradient | None":
        """Return the receive of the output's gradient; None on the last stage, which starts from the loss."""
        return ReceiveGradient(self.stage, self.microbatch) if self.stage < num_stages - 1 else None

    def resulting_send(self, num_stages: int) -> "SendGradient | None":
        """Return the send of the input's gradient; None on the first stage, whose input is tokens."""
        return SendGradient(self.stage, self.microbatch) if self.stage > 0 else None


@dataclass(frozen=True, slots=True)
class Backward(_GivesInputGradient):
    """Compute the gradients of the stage's weights and of its input. Roughly::

    dy = {} if stage is the last else wait(ReceiveGradient(stage, microbatch))
    backward of losses and of y with dy        # weight gradients add up over the microbatches
    keep x.grad for SendGradient(stage, microbatch); drop x, y and losses
    """

    code: ClassVar[str] = "B"


@dataclass(frozen=True, slots=True)
class BackwardInput(_GivesInputGradient):
    """Compute the gradient of the stage's input alone, which the previous stage waits for (arXiv:2401.10241). Roughly::

    dy = {} if stage is the last else wait(ReceiveGradient(stage, microbatch))
    backward of losses and of y with dy, with the product of each weight's gradient deferred to BackwardWeight
    keep x.grad for SendGradient(stage, microbatch); drop x, y and losses
    """

    code: ClassVar[str] = "I"


@dataclass(frozen=True, slots=True)
class BackwardWeight(Compute):
    """Compute the weight gradients that `BackwardInput` deferred; no other rank waits for them. Roughly::

    for weight, input, dy in deferred by BackwardInput(stage, microbatch):
        weight.grad += dy.T @ input            # then drop input and dy
    """

    code: ClassVar[str] = "W"

    def required_receive(self, num_stages: int) -> None:
        """Return None: all inputs are on the stage already."""

    def resulting_send(self, num_stages: int) -> None:
        """Return None: weight gradients stay on the stage."""


@dataclass(frozen=True, slots=True)
class SendActivation(Send):
    """Start to send the stage's output to the next stage. Roughly::

    isend(y.detach(), to=rank_of(stage + 1))   # over the link's activation communicator; y stays alive until sent
    """

    code: ClassVar[str] = "SA"
    kind: ClassVar[MessageKind] = "activation"

    @property
    def sources(self) -> tuple[Forward]:
        """The forward whose output is sent."""
        return (Forward(self.stage, self.microbatch),)

    @property
    def counterpart(self) -> "ReceiveActivation":
        """The receive on the next stage."""
        return ReceiveActivation(self.stage + 1, self.microbatch)


@dataclass(frozen=True, slots=True)
class ReceiveActivation(Receive):
    """Post the receive of the stage's input from the previous stage. Roughly::

    x = empty(microbatch, sequence, hidden)
    irecv(x, from=rank_of(stage - 1))          # over the link's activation communicator; no waiting here
    """

    code: ClassVar[str] = "RA"
    kind: ClassVar[MessageKind] = "activation"

    @property
    def counterpart(self) -> SendActivation:
        """The send on the previous stage."""
        return SendActivation(self.stage - 1, self.microbatch)


@dataclass(frozen=True, slots=True)
class SendGradient(Send):
    """Start to send the gradient of the stage's input to the previous stage. Roughly::

    isend(x.grad, to=rank_of(stage - 1))       # over the link's gradient communicator; x.grad stays alive until sent
    """

    code: ClassVar[str] = "SG"
    kind: ClassVar[MessageKind] = "gradient"

    @property
    def sources(self) -> tuple[Backward, BackwardInput]:
        """The backward, full or of the input alone, whose input gradient is sent."""
        return Backward(self.stage, self.microbatch), BackwardInput(self.stage, self.microbatch)

    @property
    def counterpart(self) -> "ReceiveGradient":
        """The receive on the previous stage."""
        return ReceiveGradient(self.stage - 1, self.microbatch)


@dataclass(frozen=True, slots=True)
class ReceiveGradient(Receive):
    """Post the receive of the gradient of the stage's output from the next stage. Roughly::

    dy = empty_like(y)
    irecv(dy, from=rank_of(stage + 1))         # over the link's gradient communicator; no waiting here
    """

    code: ClassVar[str] = "RG"
    kind: ClassVar[MessageKind] = "gradient"

    @property
    def counterpart(self) -> SendGradient:
        """The send on the next stage."""
        return SendGradient(self.stage + 1, self.microbatch)


@dataclass(frozen=True, slots=True)
class ReduceGradients(Instruction):
    """Complete the reduction of a stage's gradients over the data ranks, after its last backward of the step. Roughly::

    launch the reductions that did not begin inside the last backward; no waiting for the device here

    `microbatch` is that of the last backward. Where the engine reduces during the backward, nothing is left to launch.
    """

    code: ClassVar[str] = "R"


_BY_CODE: dict[str, type[Instruction]] = {
    kind.code: kind
    for kind in (
        Forward,
        Backward,
        BackwardInput,
        BackwardWeight,
        SendActivation,
        ReceiveActivation,
        SendGradient,
        ReceiveGradient,
        ReduceGradients,
    )
}
_PATTERN = re.compile(rf"(0|[1-9][0-9]*)({'|'.join(_BY_CODE)})(0|[1-9][0-9]*)")


def parse(text: str) -> Instruction:
    """Return the instruction whose text is `text`; raise ValueError where there is none.

    >>> parse("2RA0")
    ReceiveActivation(stage=2, microbatch=0)
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no instruction: expected stage, {', '.join(_BY_CODE)}, microbatch, as in 2F0")
    stage, code, microbatch = match.groups()
    return _BY_CODE[code](int(stage), int(microbatch))
