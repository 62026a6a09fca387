"""What is in a dataset, and whether its files are sound."""

from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megalite.cli.inspect.text import console_width, one_line
from megalite.cli.progress import count_progress
from megalite.errors import UserError, nearest

if TYPE_CHECKING:
    from megalite.data.indexed.dataset import IndexedDataset
    from megalite.data.indexed.statistics import LengthHistogram


def is_dataset(path: Path) -> bool:
    """Tell whether a path is a dataset's prefix."""
    return any(path.name and path.with_name(f"{path.name}{suffix}").is_file() for suffix in (".idx", ".bin"))


def nearest_prefix(path: Path) -> str:
    """Return how a message ends about a path that is none: with the nearest prefix."""
    if path.suffix in (".idx", ".bin", ".mask"):
        return f"; a prefix has no {path.suffix}, use {path.with_suffix('')}"
    folder = path if path.is_dir() else path.parent
    prefixes = [str(index.with_suffix("")) for index in folder.glob("*.idx")] if folder.is_dir() else []
    return nearest(str(path), prefixes)


def inspect_dataset(prefix: Path, shown: int, tokenizer: Path | None, plot: Path | None) -> None:
    """Check a dataset, and print its counts, its lengths and its first documents."""
    from megalite.data.indexed.dataset import IndexedDataset
    from megalite.data.indexed.statistics import length_histogram

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
        from megalite.monitoring.plots import length_histogram_plot

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
        f"tokens a document: {histogram.shortest:,} at least, a median of {histogram.median:,}, "
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
    from megalite.data.indexed.statistics import readable
    from megalite.data.tokenizers.load import load_tokenizer

    loaded = load_tokenizer(tokenizer) if tokenizer is not None else None
    digest = dataset.sidecar.tokenizer_sha256 if dataset.sidecar else None
    if loaded is not None and digest not in (None, loaded.digest):
        raise UserError(f"{tokenizer}: not the tokenizer of {dataset.prefix} (SHA-256 {str(digest)[:12]}); give that")
    for document in range(min(shown, dataset.num_documents)):
        tokens = dataset.document_tokens(document)
        head = f"document {document}, {len(tokens):,} tokens: "
        some, first = tokens[: console_width()], dataset.document_span(document)[0]
        mask = dataset.loss_mask(first, len(some)) if dataset.has_loss_mask else None
        text = readable(loaded, some, mask) if loaded is not None else " ".join(map(str, some.tolist()))
        yield f"{'' if document else chr(10)}{head}{one_line(text, console_width() - len(head))}"
