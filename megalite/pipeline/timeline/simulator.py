"""A discrete-event simulator of pipeline schedules: their timeline and their bubble, and whether they deadlock.

`simulate` runs the streams of all ranks under the rules of NCCL, the strictest backend that megalite uses: every
communicator executes its operations first in, first out, and a send completes only together with its receive. Whether
the streams deadlock depends on their order alone and not on durations, so one simulation proves it for all costs.
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
    ReduceGradients,
    Send,
)
from megalite.pipeline.timeline.spans import Span, Timeline, Unit


class ScheduleError(Exception):
    """The streams are not a valid schedule: they cannot all run to their end."""


class ScheduleDeadlock(ScheduleError):
    """Ranks wait for each other, or for an instruction that never runs; the message says which."""


class CrossedMessages(ScheduleError):
    """A send is matched with the receive of another message: tensors would be swapped without an error."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The duration of each kind of instruction, in `unit`: one number for all stages, or a tuple with one per stage.

    By default a forward takes 1, a backward 2, each half of a split backward 1, and a message or a reduction 0.

    A stage's gradients are reduced in `reduce_buckets` equal buckets, which become ready one after the other during its
    last backward; with one bucket the reduction begins after that backward. Where the weight gradients are deferred,
    all buckets become ready at the end.
    """

    forward: float | tuple[float, ...] = 1.0
    backward: float | tuple[float, ...] = 2.0
    backward_input: float | tuple[float, ...] = 1.0
    backward_weight: float | tuple[float, ...] = 1.0
    send: float | tuple[float, ...] = 0.0
    unit: Unit = "forward"
    reduce: float | tuple[float, ...] = 0.0
    reduce_buckets: int = 1

    def of(self, instruction: Instruction) -> float:
        """Return the duration of an instruction; a receive takes no time."""
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
            case ReduceGradients():
                cost = self.reduce
            case _:
                return 0.0
        return cost[instruction.stage] if isinstance(cost, tuple) else cost


def measured_cost(timeline: Timeline) -> Cost:
    """Return the median duration of each kind of compute on each stage of a measured timeline, and of its messages.

    Where a stage ran only full backwards or only split backwards, the other durations are derived: a full backward is
    the sum of its halves, and a half is half of the full backward. The duration of a message is the time from the end
    of the compute that sends it to the start of the compute that waited for it; other messages are not counted.

    A simulation of the same schedule with these costs shows the idle time that is due to its order and to uneven
    stages. Further idle time of the measured step is due to the variation of durations.
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
    reductions = {span.instruction.stage: span.end - span.start for span in timeline.reductions}
    return Cost(
        forward,
        backward,
        for_input,
        for_weight,
        send=median(waits) if waits else 0.0,
        unit=timeline.unit,
        reduce=tuple(reductions.get(stage, 0.0) for stage in stages) if reductions else 0.0,
    )


def _waits(timeline: Timeline, num_stages: int) -> Iterator[float]:
    """Yield the duration of each message that its receiver waited for."""
    span_of: dict[Instruction, Span] = {span.instruction: span for span in timeline.compute}
    free_at: dict[int, float] = {}
    for span in sorted(timeline.compute, key=lambda span: span.start):
        free_since = free_at.get(span.rank, timeline.start)
        free_at[span.rank] = span.end
        assert isinstance(span.instruction, Compute)
        receive = span.instruction.required_receive(num_stages)
        sources = receive.counterpart.sources if receive is not None else ()
        for source in (span_of[compute] for compute in sources if compute in span_of):
            if source.rank != span.rank and free_since <= source.end <= span.start:
                yield span.start - source.end


Communicator = Callable[[int, int, MessageKind], Hashable]
"""Returns the key of the communicator of a message between two ranks; messages with one key share a queue."""


def one_per_link_and_kind(source: int, destination: int, kind: MessageKind) -> Hashable:
    """Return a communicator per directed link and kind of message, as megalite's p2p has them."""
    return source, destination, kind


def simulate(
    streams: Sequence[Sequence[Instruction]],
    cost: Cost | None = None,
    *,
    rendezvous: bool = False,
    communicator: Communicator = one_per_link_and_kind,
) -> Timeline:
    """Simulate the streams, one per rank, and return the timeline of their forwards and backwards.

    A send is posted when its instruction is reached. It is transferred, in time ``cost.send``, when send and receive
    are both posted and at the head of their communicator. The rank continues meanwhile, unless `rendezvous` is set:
    then every send blocks its rank until the transfer has ended, as a backend may do. A forward or backward waits for
    the receive of its input, or for the compute that makes it where the neighbouring stage is on the same rank.

    Raises ScheduleDeadlock where ranks wait for ever or a posted operation stays without its counterpart,
    CrossedMessages where a send is matched with the receive of another message, ScheduleError where the streams contain
    an instruction twice or a message to a stage that no rank runs.
    """
    return _Simulation(streams, cost or Cost(), rendezvous, communicator).run()


_Choice = tuple[Instruction, ...]
"""Alternative instructions, one of which must have run."""


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
        self.reductions_end = [0.0] * len(streams)

    def run(self) -> Timeline:
        ranks = range(len(self.streams))
        while sum(self._advance(rank) for rank in ranks):  # a sum, so that every rank advances
            pass
        if any(self._current(rank) for rank in ranks) or self._unmatched_posts():
            raise ScheduleDeadlock(self._describe_deadlock())
        return Timeline(tuple(self.spans), self.cost.unit)

    def _current(self, rank: int) -> Instruction | None:
        stream, position = self.streams[rank], self.position[rank]
        return stream[position] if position < len(stream) else None

    def _advance(self, rank: int) -> bool:
        """Run a rank until it has to wait; return whether it made progress."""
        before = self.position[rank], len(self.posted)
        while (instruction := self._current(rank)) is not None and self._finish(rank, instruction):
            self.position[rank] += 1
        return (self.position[rank], len(self.posted)) != before

    def _finish(self, rank: int, instruction: Instruction) -> bool:
        """Simulate an instruction; return whether it ended, False where the rank has to wait."""
        if self._unmet_need(instruction):
            return False
        match instruction:
            case Compute():
                start = max([self.clock[rank], *(self._when(choice) for choice in self._needs(instruction))])
                self.clock[rank] = self.done[instruction] = start + self.cost.of(instruction)
                self.spans.append(Span(rank, instruction, start, self.clock[rank]))
            case ReduceGradients():
                self._reduce(rank, instruction)
            case Send() | Receive():
                self._post(rank, instruction)
                if self.rendezvous and isinstance(instruction, Send):
                    self.clock[rank] = max(self.clock[rank], self.done.get(instruction, 0.0))
                    return instruction in self.done
        return True

    def _reduce(self, rank: int, instruction: ReduceGradients) -> None:
        """Reduce a stage's gradients beside the rank's compute; a rank's reductions run one after the other."""
        at, cost = (instruction.stage, instruction.microbatch), self.cost.of(instruction)
        last = next(s for s in reversed(self.spans) if (s.instruction.stage, s.instruction.microbatch) == at)
        buckets = self.cost.reduce_buckets if isinstance(last.instruction, Backward) else 1
        first_ready = last.start + (last.end - last.start) / buckets
        start = max(first_ready, self.reductions_end[rank])
        self.reductions_end[rank] = max(start + cost, last.end + cost / buckets)
        if cost:
            self.spans.append(Span(rank, instruction, start, self.reductions_end[rank]))

    def _needs(self, instruction: Instruction) -> list[_Choice]:
        """Return the dependencies of an instruction; of each tuple, one instruction must have run."""
        needs: list[_Choice] = []
        match instruction:
            case Send():
                needs.append(instruction.sources)
            case Backward(stage, microbatch) | BackwardInput(stage, microbatch):
                needs.append((Forward(stage, microbatch),))
            case BackwardWeight(stage, microbatch):
                needs.append((BackwardInput(stage, microbatch),))
            case ReduceGradients(stage, microbatch):
                needs.append((Backward(stage, microbatch), BackwardWeight(stage, microbatch)))
        if isinstance(instruction, Compute) and (receive := instruction.required_receive(self.num_stages)) is not None:
            here, there = self._ends(receive)
            needs.append((receive,) if here != there else receive.counterpart.sources)
        return needs

    def _when(self, choice: _Choice) -> float:
        return min(self.done[needed] for needed in choice if needed in self.done)

    def _unmet_need(self, instruction: Instruction) -> _Choice:
        """Return the first dependency of an instruction that has not run; empty where all have."""
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
        """Transfer a message whose send and receive are at the head of a communicator; return whether there is one."""
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

    def _unmatched_posts(self) -> list[Instruction]:
        return [posted.operation for ends in self.queues.values() for queue in ends.values() for posted in queue]

    def _describe_deadlock(self) -> str:
        waits = [
            f"rank {rank} stands at {instruction}, waiting for {self._missing(instruction)}"
            for rank in range(len(self.streams))
            if (instruction := self._current(rank)) is not None
        ]
        standing = self._unmatched_posts()
        if standing:
            waits.append("posted and not met: " + ", ".join(str(operation) for operation in standing))
        return "; ".join(waits)

    def _missing(self, instruction: Instruction) -> str:
        awaited = self._unmet_need(instruction)
        if isinstance(instruction, Send) and instruction in self.posted:
            awaited = (instruction.counterpart,)
        names = " or ".join(str(needed) for needed in awaited)
        if self.posted.intersection(awaited):
            return names
        return f"{names}, which has not been {'posted' if isinstance(awaited[0], Receive) else 'run'}"


def _rank_of_stage(streams: Sequence[Sequence[Instruction]]) -> dict[int, int]:
    """Return the rank of each stage; raise ScheduleError for a stage on two ranks or a repeated instruction."""
    repeated = [instruction for stream in streams for instruction, count in Counter(stream).items() if count > 1]
    if repeated:
        raise ScheduleError(f"{repeated[0]} stands in its stream more than once")
    rank_of_stage: dict[int, int] = {}
    for rank, stream in enumerate(streams):
        for stage in {instruction.stage for instruction in stream}:
            if rank_of_stage.setdefault(stage, rank) != rank:
                raise ScheduleError(f"stage {stage} is run by rank {rank_of_stage[stage]} and by rank {rank}")
    return rank_of_stage
