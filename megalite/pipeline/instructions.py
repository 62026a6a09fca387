"""The vocabulary of a pipeline schedule: what one rank does, one frozen instruction at a time.

An instruction names its stage and its microbatch and nothing else: no buffers, no tags, no ranks. It prints as
stage, code, microbatch (``2F0``: stage 2 runs the forward of microbatch 0) and `parse` reads that back.

Messages carry no tags either. The k-th send from one rank to another meets the k-th receive posted there, activations
and gradients counted apart, so the order of a stream is the whole protocol. Between two neighbouring stages of one rank
there is no message: the rank hands the tensor over to itself.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from megalite.parallel.placement import MessageKind, Placement


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing that a pipeline stage does for one microbatch.

    `stage` is the stage that runs it, in ``0..num_stages - 1``; a rank that holds several virtual stages runs the
    instructions of each of them.
    """

    stage: int
    microbatch: int
    code: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.stage}{self.code}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Compute(Instruction):
    """An instruction that keeps the device busy."""

    def takes(self, num_stages: int) -> "Receive | None":
        """Return what this needs from the neighbouring stage, named as its receive; None where it needs nothing."""
        raise NotImplementedError

    def makes(self, num_stages: int) -> "Send | None":
        """Return what this makes for the neighbouring stage, named as its send; None where the result stays."""
        raise NotImplementedError

    def receive(self, placement: Placement) -> "Receive | None":
        """Return the receive this waits for; None where it needs nothing, or a neighbour on its own rank has it."""
        needed = self.takes(placement.num_stages)
        return needed if needed and placement.crosses(needed.stage, needed.counterpart.stage) else None

    def send(self, placement: Placement) -> "Send | None":
        """Return the send that passes the result on; None where it stays on the rank."""
        made = self.makes(placement.num_stages)
        return made if made and placement.crosses(made.stage, made.counterpart.stage) else None

    def hand_over(self, placement: Placement) -> "Receive | None":
        """Return the receive that the result stands in for on this rank; None unless the neighbour is on it too."""
        made = self.makes(placement.num_stages)
        return made.counterpart if made and self.send(placement) is None else None


@dataclass(frozen=True, slots=True)
class Send(Instruction):
    """Start sending a result of this stage to a neighbour, and go on without waiting for it to arrive."""

    kind: ClassVar[MessageKind]

    @property
    def sources(self) -> tuple[Compute, ...]:
        """The compute instructions of which any one makes what is sent."""
        raise NotImplementedError

    @property
    def counterpart(self) -> "Receive":
        """The receive, on the neighbour, that this send has to meet."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Receive(Instruction):
    """Post the receive of something a neighbour sends, and go on; the compute that needs it waits for it."""

    kind: ClassVar[MessageKind]

    @property
    def counterpart(self) -> Send:
        """The send, on the neighbour, that this receive has to meet."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Forward(Compute):
    """Run the stage's layers on one microbatch. Roughly::

    x = tokens[microbatch] if stage == 0 else wait(ReceiveActivation(stage, microbatch))
    y = layers(x)                              # the last stage: the loss, divided by the number of microbatches
    keep x and y until Backward or BackwardInput(stage, microbatch)
    """

    code: ClassVar[str] = "F"

    def takes(self, num_stages: int) -> "ReceiveActivation | None":
        """Return the stage's input; None on the first stage, which reads tokens."""
        return ReceiveActivation(self.stage, self.microbatch) if self.stage > 0 else None

    def makes(self, num_stages: int) -> "SendActivation | None":
        """Return the stage's output; None on the last stage, which ends in the loss."""
        return SendActivation(self.stage, self.microbatch) if self.stage < num_stages - 1 else None


@dataclass(frozen=True, slots=True)
class _GivesInputGradient(Compute):
    """What `Backward` and `BackwardInput` share: they take the output's gradient and make the input's."""

    def takes(self, num_stages: int) -> "ReceiveGradient | None":
        """Return the output's gradient; None on the last stage, which starts from the loss."""
        return ReceiveGradient(self.stage, self.microbatch) if self.stage < num_stages - 1 else None

    def makes(self, num_stages: int) -> "SendGradient | None":
        """Return the input's gradient; None on the first stage, whose input is tokens."""
        return SendGradient(self.stage, self.microbatch) if self.stage > 0 else None


@dataclass(frozen=True, slots=True)
class Backward(_GivesInputGradient):
    """Run the stage's layers backwards, for their weights and their input. Roughly::

    dy = 1 if stage is the last else wait(ReceiveGradient(stage, microbatch))
    y.backward(dy)                             # weight gradients add up over the microbatches
    keep x.grad for SendGradient(stage, microbatch); drop x and y
    """

    code: ClassVar[str] = "B"


@dataclass(frozen=True, slots=True)
class BackwardInput(_GivesInputGradient):
    """Run the stage's layers backwards for their input alone: what the stage before waits for (arXiv:2401.10241).
    Roughly::

    dy = 1 if stage is the last else wait(ReceiveGradient(stage, microbatch))
    y.backward(dy), each weight's product (its input, its output's gradient) put aside for BackwardWeight
    keep x.grad for SendGradient(stage, microbatch); drop x and y
    """

    code: ClassVar[str] = "I"


@dataclass(frozen=True, slots=True)
class BackwardWeight(Compute):
    """Multiply out the weight gradients that `BackwardInput` put aside; nobody waits for them. Roughly::

    for weight, input, dy in what BackwardInput(stage, microbatch) put aside:
        weight.grad += dy.T @ input            # and drop both
    """

    code: ClassVar[str] = "W"

    def takes(self, num_stages: int) -> None:
        """Take nothing: all that is needed lies on the stage."""

    def makes(self, num_stages: int) -> None:
        """Make nothing for another stage: weight gradients stay."""


@dataclass(frozen=True, slots=True)
class SendActivation(Send):
    """Start sending the stage's output to the next stage. Roughly::

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
    """Start sending the gradient of the stage's input to the previous stage. Roughly::

    isend(x.grad, to=rank_of(stage - 1))       # over the link's gradient communicator; x.grad stays alive until sent
    """

    code: ClassVar[str] = "SG"
    kind: ClassVar[MessageKind] = "gradient"

    @property
    def sources(self) -> tuple[Backward, BackwardInput]:
        """The backward, whole or of the input alone, whose input gradient is sent."""
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
    )
}
_PATTERN = re.compile(rf"(0|[1-9][0-9]*)({'|'.join(_BY_CODE)})(0|[1-9][0-9]*)")


def parse(text: str) -> Instruction:
    """Return the instruction that prints as `text`; raise ValueError where none does.

    >>> parse("2RA0")
    ReceiveActivation(stage=2, microbatch=0)
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no instruction: expected stage, {', '.join(_BY_CODE)}, microbatch, as in 2F0")
    stage, code, microbatch = match.groups()
    return _BY_CODE[code](int(stage), int(microbatch))
