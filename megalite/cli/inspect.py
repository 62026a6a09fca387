"""``megalite inspect``: what is in a dataset, and which documents a step of a run trains on."""

import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalite.cli.progress import count_progress
from megalite.errors import UserError, nearest

if TYPE_CHECKING:
    from megalite.data.indexed import IndexedDataset
    from megalite.data.inspection import LengthHistogram
    from megalite.provenance import Provenance, SeenSample


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("inspect")(inspect)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A dataset's prefix, a run's folder or a run file.")],
    step: Annotated[int | None, typer.Option(help="Of a run: the step whose documents are shown, from 1.")] = None,
    rank: Annotated[int | None, typer.Option(help="With --step: only what this rank trains on.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --step: a JSON line a sample, texts whole.")] = False,
    documents: Annotated[
        int | None, typer.Option(min=0, help="Of a dataset: how many documents are shown; 3 unless given.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Of a dataset: the tokenizer to decode them with.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Of a dataset: write the histogram as this PNG.")] = None,
) -> None:
    """Show and check a dataset; or show what a step of a run trains on, from its configuration alone."""
    of_run = {"--step": step is not None, "--rank": rank is not None, "--json": as_json}
    of_dataset = {
        "--documents": documents is not None,
        "--tokenizer": tokenizer is not None,
        "--plot": plot is not None,
    }
    if any(path.name and path.with_name(f"{path.name}{suffix}").is_file() for suffix in (".idx", ".bin")):
        _refuse(path, "a dataset", of_run)
        _inspect_dataset(path, 3 if documents is None else documents, tokenizer, plot)
    elif (path / "config.yaml").is_file() or path.suffix in (".yaml", ".yml"):
        _refuse(path, "a run", of_dataset)
        _inspect_run(path, step, rank, as_json)
    else:
        raise UserError(f"{path}: neither a dataset's prefix, a run's folder nor a run file{_nearest_prefix(path)}")


def _refuse(path: Path, what: str, given: Mapping[str, bool]) -> None:
    for option in (name for name, is_given in given.items() if is_given):
        raise UserError(f"{option}: {path} is {what}, of which it says nothing; leave it out")


def _nearest_prefix(path: Path) -> str:
    if path.suffix in (".idx", ".bin", ".mask"):
        return f"; a prefix has no {path.suffix}, use {path.with_suffix('')}"
    folder = path if path.is_dir() else path.parent
    prefixes = [str(index.with_suffix("")) for index in folder.glob("*.idx")] if folder.is_dir() else []
    return nearest(str(path), prefixes)


def _inspect_run(path: Path, step: int | None, rank: int | None, as_json: bool) -> None:
    from megalite.provenance import Provenance

    if step is None:
        raise UserError(f"{path}: is a run; say which step's documents to show: --step N")
    provenance = Provenance(path)
    samples = provenance.step(step, rank)
    show = _sample_as_json if as_json else _sample_as_lines
    if not as_json:
        typer.echo(_step_header(provenance, step))
    for seen in samples:
        for line in show(provenance, seen):
            typer.echo(line)


def _step_header(provenance: "Provenance", step: int) -> str:
    config, samples = provenance.config, provenance.schedule.samples(step)
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
        yield where if text is None else f"{where}: {_one_line(text, _width() - len(where) - 2)}"


def _sample_as_json(provenance: "Provenance", seen: "SeenSample") -> Iterator[str]:
    pieces = [
        {
            "prefix": str(piece.prefix),
            "document": piece.document,
            "offset": piece.offset,
            "tokens": piece.length,
            "text": provenance.text(piece),
        }
        for piece in seen.pieces
    ]
    record = {"sample": seen.sample, "data_rank": seen.data_rank, "microbatch": seen.microbatch, "pieces": pieces}
    yield json.dumps(record, ensure_ascii=False)


def _inspect_dataset(prefix: Path, shown: int, tokenizer: Path | None, plot: Path | None) -> None:
    from megalite.data.indexed import IndexedDataset
    from megalite.data.inspection import length_histogram

    dataset = IndexedDataset(prefix)
    with count_progress("checking", "") as progress:
        dataset.verify(progress)
    with count_progress("counting", "documents") as progress:
        histogram = length_histogram(dataset, progress)
    for line in [*_counts(dataset, histogram), "", *_bars(histogram)]:
        typer.echo(line)
    for line in _first_documents(dataset, shown, tokenizer):
        typer.echo(line)
    if plot is not None:
        from megalite.files import writing
        from megalite.plots import length_histogram_plot

        with writing(plot, "give another --plot"):
            length_histogram_plot(
                histogram.bins(), histogram.documents.tolist(), histogram.tokens.tolist(), plot, title=prefix.name
            )
        typer.echo(f"histogram: {plot}")


def _counts(dataset: "IndexedDataset", histogram: "LengthHistogram") -> Iterator[str]:
    yield (
        f"{dataset.prefix}: {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens of {dataset.dtype}, "
        f"{dataset.tokens_path.stat().st_size / 1e6:,.1f} MB; the index is sound"
    )
    yield (
        f"tokens a document: {histogram.shortest:,} at least, {histogram.median:,} in the middle, "
        f"{histogram.mean:,.1f} on average, {histogram.longest:,} at most"
    )
    if dataset.has_loss_mask:
        yield "loss mask: yes; what counts stands in « »"
    sidecar = dataset.sidecar
    if sidecar is None:
        yield "no sidecar: the tokenizer is not known"
    else:
        yield (
            f"tokenizer: {sidecar.vocab_size:,} ids, SHA-256 {sidecar.tokenizer_sha256[:12]}; unigram entropy "
            f"{sidecar.token_counts_entropy:.3f} nats a token"
        )


def _bars(histogram: "LengthHistogram") -> Iterator[str]:
    total, most = max(1, int(histogram.documents.sum())), max(1, int(histogram.documents.max()))
    names = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high in histogram.bins()]
    width = max(len("tokens"), *map(len, names))
    yield f"{'tokens':>{width}}  documents"
    bins = zip(names, histogram.documents.tolist(), strict=True)
    for name, count in dropwhile(lambda named: not named[1], bins):
        bar = "#" * max(1 if count else 0, round(40 * count / most))
        yield f"{name:>{width}}  {bar:<40} {count:>12,} {count / total:>6.1%}"


def _first_documents(dataset: "IndexedDataset", shown: int, tokenizer: Path | None) -> Iterator[str]:
    from megalite.data.inspection import readable
    from megalite.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer) if tokenizer is not None else None
    digest = dataset.sidecar.tokenizer_sha256 if dataset.sidecar else None
    if loaded is not None and digest not in (None, loaded.digest):
        raise UserError(f"{tokenizer}: not the tokenizer of {dataset.prefix} (SHA-256 {str(digest)[:12]}); give that")
    for document in range(min(shown, dataset.num_documents)):
        tokens = dataset.document_tokens(document)
        head = f"document {document}, {len(tokens):,} tokens: "
        some, first = tokens[: _width()], dataset.document_span(document)[0]
        mask = dataset.loss_mask(first, len(some)) if dataset.has_loss_mask else None
        text = readable(loaded, some, mask) if loaded is not None else " ".join(map(str, some.tolist()))
        yield f"{'' if document else chr(10)}{head}{_one_line(text, _width() - len(head))}"


def _one_line(text: str, width: int) -> str:
    flat = " ".join(text.split())
    room = max(40, width)
    return flat if len(flat) <= room else f"{flat[: room - 3]}..."


def _width() -> int:
    return shutil.get_terminal_size((160, 24)).columns
