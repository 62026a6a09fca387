"""Timeline recorder: gathers the measured spans of traced steps, and plots them beside a simulation."""

from collections.abc import Callable
from pathlib import Path

from megalite.files import write_atomically
from megalite.monitoring.callback import Callback, RunEnd, RunStart
from megalite.monitoring.step_report import StepReport
from megalite.parallel.json_collectives import gather_json
from megalite.pipeline.instructions import parse
from megalite.pipeline.schedules import SCHEDULES, all_streams
from megalite.pipeline.timeline.chrome_trace import chrome_trace
from megalite.pipeline.timeline.simulator import measured_cost, simulate
from megalite.pipeline.timeline.spans import Span, Timeline


class TimelineRecorder(Callback):
    """Writes ``timeline_step_N.json``, a trace for Perfetto and a picture for each step of `train.trace_steps`."""

    def __init__(self, info: Callable[[str], None]) -> None:
        """`info` prints a line on the console."""
        self._info = info
        self._picture: Path | None = None

    def on_start(self, start: RunStart) -> None:
        self._config, self._mesh = start.config, start.mesh

    def after_step(self, report: StepReport) -> None:
        """Gather the spans of all stages of a traced step. Collective."""
        if report.step not in self._config.train.trace_steps:
            return
        measures = self._mesh.rank in self._mesh.layout.groups("pipeline")[0]
        mine = [[s.rank, str(s.instruction), s.start, s.end] for s in report.spans] if measures else []
        gathered = gather_json(mine, self._mesh)
        if self._mesh.rank == 0:
            spans = (Span(rank, parse(code), start, end) for part in gathered for rank, code, start, end in part)
            self._write(report.step, Timeline(tuple(spans)))

    def _write(self, step: int, measured: Timeline) -> None:
        from megalite.pipeline.timeline.plot import plot_timelines

        schedule = self._config.parallel.schedule
        # Counted from the spans, since the batch size may still be ramping up.
        microbatches = 1 + max(span.instruction.microbatch for span in measured.spans)
        streams = all_streams(SCHEDULES[schedule], self._mesh.placement, microbatches)
        simulated = simulate(streams, measured_cost(measured))
        timelines = {"measured": measured, "simulated with the measured times": simulated}
        file = self._config.run.dir / f"timeline_step_{step}"
        write_atomically(file.with_suffix(".json"), measured.to_json().encode() + b"\n")
        write_atomically(file.with_suffix(".trace.json"), chrome_trace(timelines).encode())
        self._picture = file.with_suffix(".png")
        plot_timelines(timelines, self._picture, f"step {step}: {schedule}, {self._mesh.layout}")
        self._info(
            f"step {step}: pipeline bubble {measured.bubble_fraction:.1%} measured, "
            f"{simulated.bubble_fraction:.1%} simulated with the measured times"
        )

    def on_end(self, end: RunEnd) -> None:
        if self._picture is not None:
            self._info(f"pipeline timeline: {self._picture}")
