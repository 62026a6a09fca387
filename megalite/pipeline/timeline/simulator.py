"""Time a schedule without running it, and find out whether it could run at all.

`simulate` plays the streams of all ranks against each other under NCCL's rule, which is the strictest that megalite
runs on: every communicator executes the operations posted on it first in, first out, and a send completes only
together with its receive. Whether the streams get through depends on their order alone, never on the durations, so one
simulation at any cost is a proof for all.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from megalite.parallel.placement import MessageKind
from megalite.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Instruction,
    Receive,
    Send,
)
from megalite.pipeline.timeline.spans import Span, Timeline, Unit


class ScheduleError(Exception):
    """The streams are no schedule: they cannot all run to their end as they are written."""


class ScheduleDeadlock(ScheduleError):
    """Ranks wait for each other, or for something that never comes; the message says who waits for what."""


class CrossedMessages(ScheduleError):
    """A send meets the receive of another message: the tensors would be swapped without a sound."""


@dataclass(frozen=True, slots=True)
class Cost:
    """How long things take, in `unit`: one number for all stages, or a tuple with one for each.

    The default is the textbook's: a forward takes 1, a backward 2, each of its halves 1, messages nothing.
    """

    forward: float | tuple[float, ...] = 1.0
    backward: float | tuple[float, ...] = 2.0
    backward_input: float | tuple[float, ...] = 1.0
    backward_weight: float | tuple[float, ...] = 1.0
    send: float | tuple[float, ...] = 0.0
    unit: Unit = "forward"

    def of(self, instruction: Instruction) -> float:
        """Return how long an instruction takes; a receive takes no time of its own."""
        match instruction:
            case Forward():
                cost = self.forward
            case Backward():
                cost = self.backward
            case BackwardInput():
                cost = self.backward_input
            case BackwardWeight():
                cost = self.backward_weight
            case Send():
                cost = self.send
            case _:
                return 0.0
        return cost[instruction.stage] if isinstance(cost, tuple) else cost


def measured_cost(timeline: Timeline) -> Cost:
    """Return the median time of each kind of compute on each stage of a measured timeline, and of its messages.

    Where a stage ran its backwards only whole, or only in halves, the other is filled in: a whole is the sum of its
    halves, and a half, which nothing tells apart, half of the whole. A message's time is that from the end of what
    made it to the start of what was waiting for it; messages that nobody waited for say nothing about it.

    Simulated with it, the same schedule shows what its order and the uneven stages cost; whatever the measured step
    idles beyond that, it lost because no two computes or messages take the same time.
    """
    durations: dict[tuple[type[Instruction], int], list[float]] = defaultdict(list)
    for span in timeline.compute:
        durations[type(span.instruction), span.instruction.stage].append(span.end - span.start)
    known = {of: median(times) for of, times in durations.items()}
    stages = range(1 + max((stage for _, stage in known), default=-1))
    for stage in stages:
        whole = known.get((Backward, stage))
        for half in (BackwardInput, BackwardWeight):
            known.setdefault((half, stage), 0.0 if whole is None else whole / 2)
        known.setdefault((Backward, stage), known[BackwardInput, stage] + known[BackwardWeight, stage])
    forward, backward, for_input, for_weight = (
        tuple(known.get((kind, stage), 0.0) for stage in stages)
        for kind in (Forward, Backward, BackwardInput, BackwardWeight)
    )
    waits = list(_waits(timeline, len(stages)))
    return Cost(forward, backward, for_input, for_weight, median(waits) if waits else 0.0, timeline.unit)


def _waits(timeline: Timeline, num_stages: int) -> Iterator[float]:
    """Yield how long each message took that found its rank waiting."""
    made = {span.instruction: span for span in timeline.compute}
    free_at: dict[int, float] = {}
    for span in sorted(timeline.compute, key=lambda span: span.start):
        free_since = free_at.get(span.rank, timeline.start)
        free_at[span.rank] = span.end
        assert isinstance(span.instruction, Compute)
        taken = span.instruction.takes(num_stages)
        sources = taken.counterpart.sources if taken is not None else ()
        for source in (made[one] for one in sources if one in made):
            if source.rank != span.rank and free_since <= source.end <= span.start:
                yield span.start - source.end


Communicator = Callable[[int, int, MessageKind], Hashable]
"""Names the communicator of a message from one rank to another: what shares a name, shares a queue."""


def one_per_link_and_kind(source: int, destination: int, kind: MessageKind) -> Hashable:
    """Give each directed link one communicator for activations and one for gradients, as megalite's p2p does."""
    return source, destination, kind


def simulate(
    streams: Sequence[Sequence[Instruction]],
    cost: Cost | None = None,
    *,
    rendezvous: bool = False,
    communicator: Communicator = one_per_link_and_kind,
) -> Timeline:
    """Run the streams, one for each rank, and return when each forward and backward ran.

    A send starts once its instruction is reached, moves when both ends are posted and at the head of their
    communicator, and takes ``cost.send``. The rank goes on meanwhile, unless `rendezvous` is set: then every send
    blocks it until the message is across, which is the most that a backend may do. A forward or backward waits for
    the receive that its stage needs, or for the compute itself where the neighbouring stage is on the same rank.

    Raises ScheduleDeadlock where ranks wait for ever or a posted operation stays without its other end,
    CrossedMessages where a send meets the receive of another message, ScheduleError where the streams run an
    instruction twice or talk to a stage that no rank has.
    """
    return _Simulation(streams, cost or Cost(), rendezvous, communicator).run()


_Choice = tuple[Instruction, ...]
"""Instructions of which any one will do."""


@dataclass(frozen=True, slots=True)
class _Posted:
    operation: Send | Receive
    time: float


class _Simulation:
    """The state of one simulation: clocks, positions, and the queues of the communicators."""

    def __init__(
        self, streams: Sequence[Sequence[Instruction]], cost: Cost, rendezvous: bool, communicator: Communicator
    ) -> None:
        self.streams, self.cost, self.rendezvous, self.communicator = streams, cost, rendezvous, communicator
        self.rank_of_stage = _rank_of_stage(streams)
        self.num_stages = 1 + max(self.rank_of_stage, default=-1)
        self.position = [0] * len(streams)
        self.clock = [0.0] * len(streams)
        self.spans: list[Span] = []
        self.posted: set[Instruction] = set()
        self.done: dict[Instruction, float] = {}
        self.queues: dict[Hashable, dict[int, deque[_Posted]]] = defaultdict(lambda: defaultdict(deque))
        self.free_at: dict[Hashable, float] = defaultdict(float)

    def run(self) -> Timeline:
        ranks = range(len(self.streams))
        while sum(self._advance(rank) for rank in ranks):  # a sum, so that every rank has its turn
            pass
        if any(self._current(rank) for rank in ranks) or self._standing():
            raise ScheduleDeadlock(self._who_waits_for_what())
        return Timeline(tuple(self.spans), self.cost.unit)

    def _current(self, rank: int) -> Instruction | None:
        stream, position = self.streams[rank], self.position[rank]
        return stream[position] if position < len(stream) else None

    def _advance(self, rank: int) -> bool:
        """Run a rank until it has to wait; return whether it got anywhere."""
        before = self.position[rank], len(self.posted)
        while (instruction := self._current(rank)) is not None and self._finish(rank, instruction):
            self.position[rank] += 1
        return (self.position[rank], len(self.posted)) != before

    def _finish(self, rank: int, instruction: Instruction) -> bool:
        """Do what an instruction asks for and return True, or return False where the rank has to wait."""
        if self._awaited(instruction):
            return False
        match instruction:
            case Compute():
                start = max([self.clock[rank], *(self._when(choice) for choice in self._needs(instruction))])
                self.clock[rank] = self.done[instruction] = start + self.cost.of(instruction)
                self.spans.append(Span(rank, instruction, start, self.clock[rank]))
            case Send() | Receive():
                self._post(rank, instruction)
                if self.rendezvous and isinstance(instruction, Send):
                    self.clock[rank] = max(self.clock[rank], self.done.get(instruction, 0.0))
                    return instruction in self.done
        return True

    def _needs(self, instruction: Instruction) -> list[_Choice]:
        """Return what must be done before an instruction; of each choice, any one."""
        needs: list[_Choice] = []
        match instruction:
            case Send():
                needs.append(instruction.sources)
            case Backward(stage, microbatch) | BackwardInput(stage, microbatch):
                needs.append((Forward(stage, microbatch),))
            case BackwardWeight(stage, microbatch):
                needs.append((BackwardInput(stage, microbatch),))
        if isinstance(instruction, Compute) and (taken := instruction.takes(self.num_stages)) is not None:
            here, there = self._ends(taken)
            needs.append((taken,) if here != there else taken.counterpart.sources)
        return needs

    def _when(self, choice: _Choice) -> float:
        return min(self.done[one] for one in choice if one in self.done)

    def _awaited(self, instruction: Instruction) -> _Choice:
        """Return the first thing that an instruction needs and that has not been done; empty where nothing is."""
        return next((choice for choice in self._needs(instruction) if not self.done.keys() & set(choice)), ())

    def _post(self, rank: int, operation: Send | Receive) -> None:
        if operation in self.posted:
            return
        self.posted.add(operation)
        key = self._communicator_of(operation)
        self.queues[key][rank].append(_Posted(operation, self.clock[rank]))
        while self._transfer(key):
            pass

    def _communicator_of(self, operation: Send | Receive) -> Hashable:
        here, there = self._ends(operation)
        source, destination = (here, there) if isinstance(operation, Send) else (there, here)
        return self.communicator(source, destination, operation.kind)

    def _ends(self, operation: Send | Receive) -> tuple[int, int]:
        peer = operation.counterpart.stage
        if peer not in self.rank_of_stage:
            raise ScheduleError(f"{operation} talks to stage {peer}, which no rank runs")
        return self.rank_of_stage[operation.stage], self.rank_of_stage[peer]

    def _transfer(self, key: Hashable) -> bool:
        """Move one message whose two ends are both at the head of a communicator; return whether there was one."""
        queues = self.queues[key]
        for rank, queue in queues.items():
            if not queue or not isinstance(send := queue[0].operation, Send):
                continue
            there = queues.get(self._ends(send)[1])
            if not there or not isinstance(receive := there[0].operation, Receive) or self._ends(receive)[1] != rank:
                continue
            if send.counterpart != receive:
                raise CrossedMessages(f"{send} meets {receive}, which is there for {receive.counterpart}")
            start = max(queue.popleft().time, there.popleft().time, self.free_at[key])
            self.free_at[key] = self.done[send] = self.done[receive] = start + self.cost.of(send)
            return True
        return False

    def _standing(self) -> list[Instruction]:
        return [posted.operation for ends in self.queues.values() for queue in ends.values() for posted in queue]

    def _who_waits_for_what(self) -> str:
        waits = [
            f"rank {rank} stands at {instruction}, waiting for {self._missing(instruction)}"
            for rank in range(len(self.streams))
            if (instruction := self._current(rank)) is not None
        ]
        standing = self._standing()
        if standing:
            waits.append("posted and not met: " + ", ".join(str(operation) for operation in standing))
        return "; ".join(waits)

    def _missing(self, instruction: Instruction) -> str:
        awaited = self._awaited(instruction)
        if isinstance(instruction, Send) and instruction in self.posted:
            awaited = (instruction.counterpart,)
        names = " or ".join(str(one) for one in awaited)
        if self.posted.intersection(awaited):
            return names
        return f"{names}, which has not been {'posted' if isinstance(awaited[0], Receive) else 'run'}"


def _rank_of_stage(streams: Sequence[Sequence[Instruction]]) -> dict[int, int]:
    """Return which rank runs each stage, having checked that one does, and does nothing twice."""
    repeated = [instruction for stream in streams for instruction, count in Counter(stream).items() if count > 1]
    if repeated:
        raise ScheduleError(f"{repeated[0]} stands in its stream more than once")
    rank_of_stage: dict[int, int] = {}
    for rank, stream in enumerate(streams):
        for stage in {instruction.stage for instruction in stream}:
            if rank_of_stage.setdefault(stage, rank) != rank:
                raise ScheduleError(f"stage {stage} is run by rank {rank_of_stage[stage]} and by rank {rank}")
    return rank_of_stage
