"""What a step of a run trains on, as text or as JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megalite.cli.inspect.text import console_width, one_line

if TYPE_CHECKING:
    from megalite.planning.provenance import Provenance, SeenSample


def inspect_step(path: Path, step: int, rank: int | None, as_json: bool) -> None:
    """Print what a step of a run trained on, or will, on all ranks or on one."""
    from megalite.planning.provenance import Provenance

    provenance = Provenance(path)
    samples = provenance.step(step, rank)
    show = _sample_as_json if as_json else _sample_as_lines
    if not as_json:
        typer.echo(_step_header(provenance, step))
    for seen in samples:
        for line in show(provenance, seen):
            typer.echo(line)


def _step_header(provenance: "Provenance", step: int) -> str:
    config, samples = provenance.config, provenance.samples(step)
    return (
        f"step {step:,} of {config.run.dir}: samples {samples.start:,} to {samples.stop - 1:,} of the order "
        f"{config.data.order}, {config.data.sequence_length:,} tokens each; seed {config.run.seed}"
        + ("; shown before data.fim_rate moves the middle of some" if config.data.fim_rate else "")
    )


def _sample_as_lines(provenance: "Provenance", seen: "SeenSample") -> Iterator[str]:
    yield f"data rank {seen.data_rank}, microbatch {seen.microbatch}: sample {seen.sample:,}"
    for piece in seen.pieces:
        where = f"  {piece.prefix} document {piece.document:,} from token {piece.offset:,}, {piece.length:,} tokens"
        text = provenance.text(piece)
        yield where if text is None else f"{where}: {one_line(text, console_width() - len(where) - 2)}"


def _sample_as_json(provenance: "Provenance", seen: "SeenSample") -> Iterator[str]:
    pieces = [{**piece.as_json(), "text": provenance.text(piece)} for piece in seen.pieces]
    record = {"sample": seen.sample, "data_rank": seen.data_rank, "microbatch": seen.microbatch, "pieces": pieces}
    yield json.dumps(record, ensure_ascii=False)
