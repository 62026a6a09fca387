"""megalite under every schedule, recomputation, sequence parallelism and ZeRO stage, each a contender of its own.

A variant can look at itself: when its pipeline computed what (``timeline``), and what its tensors hold (``memory``).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch.distributed as dist
from contender_megalite import Megalite
from memory import bytes_of, storages, watched_allocations
from workload import Job


class Variant(Megalite):
    """megalite's trainer with some settings of its own."""

    dtype: ClassVar[str | None] = None
    """Instead of the job's."""

    def __init__(self, job: Job, layout: str) -> None:
        super().__init__(replace(job, dtype=self.dtype or job.dtype), layout)

    def observe(self, what: str) -> object:
        observations: dict[str, Callable[[], object]] = {"timeline": self.timeline, "memory": self.memory}
        return observations[what]()

    def timeline(self) -> dict[str, object]:
        """The bubble of one step as it was, and simulated with the step's own median times; equal on every rank."""
        from megalite.parallel.json_collectives import gather_json
        from megalite.pipeline.instructions import parse
        from megalite.pipeline.schedules import SCHEDULES, all_streams
        from megalite.pipeline.timeline.simulator import measured_cost, simulate
        from megalite.pipeline.timeline.spans import Span, Timeline

        spans: list[Span] = []

        def recorded(run: Callable[..., Any], *arguments: Any) -> Any:
            dist.barrier()  # one zero of time for all ranks
            result = run(*arguments, record=True)
            spans.extend(result.spans)
            return result

        with self.around_the_stream(recorded):
            self.step()
        gathered = gather_json([[s.rank, str(s.instruction), s.start, s.end] for s in spans], self.trainer.mesh)
        measured = Timeline(
            tuple(Span(r, parse(code), start, end) for part in gathered for r, code, start, end in part)
        )
        plan = self.trainer.plan
        schedule = SCHEDULES[plan.config.parallel.schedule]
        streams = all_streams(schedule, plan.placement, self.job.num_micro_batches(self.layout.size("data")))
        simulated, textbook = simulate(streams, measured_cost(measured)), simulate(streams)
        return {
            "measured_bubble": measured.bubble_fraction,
            "simulated_bubble": simulated.bubble_fraction,
            "textbook_bubble": textbook.bubble_fraction,
            "measured_seconds": measured.makespan,
            "simulated_seconds": simulated.makespan,
            "peak_microbatches": max(measured.peak_microbatches),
        }

    def memory(self) -> dict[str, int]:
        """Bytes on this rank, each tensor's memory counted once, padding too.

        ``activations`` is the most that the forwards and backwards of a step hold at once beside weights and gradients,
        their working memory and messages too; ``gradients`` what they leave, ``gradients_in_update`` what of it the
        optimizer is given; ``weights`` and ``optimizer`` stand between the steps.
        """
        stages = self.trainer.engine.stages.values()
        parameters = [parameter for stage in stages for parameter in stage.parameters()]
        found: dict[str, int] = {}

        def watched(run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            with watched_allocations() as allocations:
                result = run(*arguments, **options)
            gradients = storages(parameter.grad for parameter in parameters if parameter.grad is not None)
            found["gradients"] = sum(gradients.values())
            found["activations"] = allocations.peak(without=gradients)
            return result

        def before_update() -> None:
            divided = [fragment.tensors["gradient"] for fragment in self.trainer.state.gradients()]
            found["gradients_in_update"] = bytes_of(divided)

        self.steps += 1
        with self.around_the_stream(watched):
            self.trainer.step(self.steps, before_update=before_update)
        # At ZeRO-3 a parameter has its own elements in `ds_tensor`, and all of them in `data` while it is in use.
        weights = storages(t for p in parameters for t in (p.data, getattr(p, "ds_tensor", p.data)))
        optimizer = storages(t for fragment in self.trainer.state.fragments() for t in fragment.tensors.values())
        found["weights"] = sum(weights.values())
        found["optimizer"] = sum(size for place, size in optimizer.items() if place not in weights)
        found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in dict.fromkeys(parameters))
        return found

    @contextmanager
    def around_the_stream(self, call: Callable[..., Any]) -> Iterator[None]:
        """Have the executor's `run` called by `call`, which is given it and its arguments."""
        executor = self.trainer.executor
        run = executor.run
        executor.run = lambda stream, microbatches, *, record=False: call(run, stream, microbatches)
        try:
            yield
        finally:
            executor.run = run


def variant(
    name: str, layout: str, description: str, settings: Sequence[str], dtype: str | None = None
) -> type[Variant]:
    """Make a contender of megalite at one layout with some settings of its run file."""
    facts = {"name": name, "layouts": (layout,), "settings": tuple(settings), "dtype": dtype}
    return type(name, (Variant,), {**facts, "description": f"megalite, {description}"})


VARIANTS: tuple[type[Variant], ...] = (
    variant("megalite-gpipe", "pp2", "GPipe, ZeRO-1", ["parallel.schedule=gpipe"]),
    variant("megalite-1f1b", "pp2", "1F1B, ZeRO-1", ["parallel.schedule=1f1b"]),
    variant(
        "megalite-interleaved",
        "pp2",
        "interleaved 1F1B, 2 stages a rank, ZeRO-1",
        ["parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2"],
    ),
    variant("megalite-zb-h1", "pp2", "ZB-H1, ZeRO-1", ["parallel.schedule=zb_h1"]),
    variant(
        "megalite-zb-v",
        "pp2",
        "ZB-V, 2 stages a rank, ZeRO-1",
        ["parallel.schedule=zb_v", "parallel.virtual_stages=2"],
    ),
    variant("megalite-selective", "pp2", "1F1B, ZeRO-1, the attention core recomputed", ["train.recompute=selective"]),
    variant("megalite-full", "pp2", "1F1B, ZeRO-1, every layer recomputed", ["train.recompute=full"]),
    variant("megalite-tensor", "tp2", "tensor parallel, ZeRO-1", []),
    variant(
        "megalite-sequence",
        "tp2",
        "tensor parallel with sequence parallelism, ZeRO-1",
        ["parallel.sequence_parallel=true"],
    ),
    variant(
        "megalite-zero0",
        "dp2",
        "ZeRO-0, in fp32, which alone it has",
        ["deepspeed.zero_optimization.stage=0"],
        dtype="fp32",
    ),
    *(
        variant(f"megalite-zero{stage}", "dp2", f"ZeRO-{stage}", [f"deepspeed.zero_optimization.stage={stage}"])
        for stage in (1, 2, 3)
    ),
)
