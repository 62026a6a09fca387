"""``megalite preprocess``: text to ``.bin``, ``.idx`` and ``.json``."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalite.cli.progress import byte_progress

if TYPE_CHECKING:
    from megalite.data.preprocess import PreprocessReport


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("preprocess")(preprocess)


def preprocess(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="jsonl, jsonl.gz or txt: files or folders.")],
    tokenizer: Annotated[Path, typer.Option(help="A sentencepiece .model or a Hugging Face tokenizer.json.")],
    output: Annotated[Path, typer.Option(help="The prefix: data/corpus makes data/corpus.bin, .idx and .json.")],
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.", show_default=False)] = None,
    text_key: Annotated[str, typer.Option(help="The key of a jsonl line that holds the document.")] = "text",
    append_eod: Annotated[bool, typer.Option("--append-eod", help="End each document with <|endoftext|>.")] = False,
    on_error: Annotated[str, typer.Option(help="What a malformed line does: fail or skip.")] = "fail",
) -> None:
    """Tokenize text into Megatron's indexed format; the same bytes for any number of workers."""
    from megalite.data.preprocess import preprocess as run
    from megalite.files import writing

    with writing(output, "give another --output"), byte_progress("tokenizing") as progress:
        report = run(
            inputs,
            tokenizer,
            output,
            text_key=text_key,
            append_eod=append_eod,
            workers=workers,
            on_error=on_error,
            progress=progress,
        )
    for line in summary(output, report):
        typer.echo(line)


def summary(output: Path, report: "PreprocessReport") -> list[str]:
    """Return the closing lines."""
    processes = "1 process" if report.workers == 1 else f"{report.workers} processes"
    lines = [
        f"{output}: {report.documents:,} documents, {report.tokens:,} tokens "
        f"({report.text_bytes / report.tokens:.2f} bytes a token)",
        f"speed: {report.text_bytes / report.seconds / 1e6:.1f} MB/s, {report.tokens / report.seconds:,.0f} tokens/s, "
        f"{report.seconds:.1f} s with {processes}",
        f"unigram entropy: {report.entropy:.3f} nats a token (uniform over {report.vocab_size:,} ids: "
        f"{math.log(report.vocab_size):.3f})",
    ]
    if report.empty:
        lines.append(f"left out: {report.empty:,} documents without a token")
    if report.skipped:
        lines += [f"left out: {report.skipped:,} malformed lines", *(f"  {problem}" for problem in report.problems)]
        if report.skipped > len(report.problems):
            lines.append(f"  and {report.skipped - len(report.problems):,} more")
    return lines
