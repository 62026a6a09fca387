"""``megalite preprocess``: text to ``.bin``, ``.idx`` and ``.json``."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalite.cli.argument_types import file_name
from megalite.cli.progress import token_progress
from megalite.errors import UserError
from megalite.paths import expand

if TYPE_CHECKING:
    from megalite.data.preprocess.preprocess import PreprocessReport


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("preprocess")(preprocess)


def preprocess(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT",
            help="jsonl (also .gz, .zst, or a JSON array), parquet, arrow or txt: files, folders, quoted patterns; in "
            "the order given.",
        ),
    ],
    tokenizer: Annotated[
        Path,
        typer.Option(
            help="A sentencepiece .model, a Hugging Face tokenizer.json, GPT-2's vocab.json, cl100k_base.tiktoken, or "
            "a folder with one."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            parser=file_name, metavar="PREFIX", help="The prefix: data/corpus makes data/corpus.bin, .idx and .json."
        ),
    ],
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.", show_default=False)] = None,
    text_key: Annotated[
        list[str] | None,
        typer.Option(
            help="The key or column of the text; a.b is b in the object under a; given several times, the "
            "texts are joined by a line end. "
            "By default text; with --chat the whole object.",
            show_default=False,
        ),
    ] = None,
    split_lines: Annotated[
        bool, typer.Option("--split-lines", help="Each line of a .txt file is a document, not the file.")
    ] = False,
    append_eod: Annotated[bool, typer.Option("--append-eod", help="End each document with <|endoftext|>.")] = False,
    eod_token: Annotated[
        str | None, typer.Option(help="End each document with this token of the vocabulary.", show_default=False)
    ] = None,
    prepend_bos: Annotated[
        bool, typer.Option("--prepend-bos", help="Begin each document with the tokenizer's beginning token.")
    ] = False,
    bos_token: Annotated[
        str | None, typer.Option(help="Begin each document with this token of the vocabulary.", show_default=False)
    ] = None,
    on_error: Annotated[str, typer.Option(help="What a malformed or empty document does: fail or skip.")] = "fail",
    min_tokens: Annotated[int, typer.Option(help="Leave out documents of fewer tokens.")] = 0,
    dedup: Annotated[bool, typer.Option("--dedup", help="Of equal documents write the first alone.")] = False,
    document_shuffle: Annotated[
        int | None,
        typer.Option(metavar="SEED", help="Write the documents in an order drawn by this seed.", show_default=False),
    ] = None,
    chat: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE",
            help="Documents are conversations; the name of a chat template, or its file. Writes .mask as well.",
            show_default=False,
        ),
    ] = None,
    ignore_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Pass over this key of conversations and messages, such as tools; may be given several times.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a dataset that is there.")] = False,
) -> None:
    """Tokenize text into Megatron's indexed format; the same bytes for any number of workers.

    An interrupted run goes on where it was when the same command is given again.
    """
    # Threads for matrix products, of which there are none here, would keep workers from being forked.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from megalite.data.preprocess.preprocess import preprocess as run
    from megalite.data.preprocess.workers import Interrupted
    from megalite.files import writing

    try:
        with writing(output, "give another --output"), token_progress("tokenizing") as progress:
            report = run(
                inputs,
                tokenizer,
                output,
                text_key=text_key,
                split_lines=split_lines,
                append_eod=append_eod,
                eod_token=eod_token,
                prepend_bos=prepend_bos,
                bos_token=bos_token,
                ignore_key=ignore_key or (),
                workers=workers,
                on_error=on_error,
                min_tokens=min_tokens,
                dedup=dedup,
                document_shuffle=document_shuffle,
                chat=chat if chat is None else _template(chat),
                overwrite=force,
                progress=progress,
            )
    except Interrupted as stop:
        typer.echo(f"megalite: interrupted; {stop.fix}", err=True)
        raise typer.Exit(stop.status) from None
    for line in summary(output, report):
        typer.echo(line)


def _template(chat: str) -> str:
    """Return the name of a chat template as it is, and the path of its file expanded."""
    try:
        return expand(chat)
    except ValueError as error:
        raise UserError(f"--chat={chat!r}{error}") from None


def summary(output: Path, report: "PreprocessReport") -> list[str]:
    """Return the closing lines."""
    processes = "1 process" if report.workers == 1 else f"{report.workers} processes"
    lines = [
        f"{output}: {report.documents:,} documents, {report.tokens:,} tokens "
        f"({report.text_bytes / report.tokens:.2f} bytes of input a token)",
        f"speed: {report.new_text_bytes / report.seconds / 1e6:.1f} MB/s, "
        f"{report.new_tokens / report.seconds:,.0f} tokens/s, {report.seconds:.1f} s with {processes}",
        f"unigram entropy: {report.entropy:.3f} nats a token (uniform over {report.vocab_size:,} ids: "
        f"{math.log(report.vocab_size):.3f})",
    ]
    if resumed := report.text_bytes - report.new_text_bytes:
        lines.append(f"resumed: {resumed / 1e6:.1f} MB were tokenized by the run before")
    for count, what in (
        (report.short, "documents shorter than --min-tokens"),
        (report.duplicates, "documents equal to an earlier one"),
        (report.empty, "documents without a token"),
        (report.skipped, "malformed documents"),
    ):
        if count:
            lines.append(f"left out: {count:,} {what}")
    lines += [f"  {problem}" for problem in report.problems]
    if report.problems and report.empty + report.skipped > len(report.problems):
        lines.append(f"  and {report.empty + report.skipped - len(report.problems):,} more")
    if report.ignored:
        counts = ", ".join(f"{key} of {count:,}" for key, count in report.ignored.items())
        lines.append(f"not read: keys of conversations: {counts}")
    lines += [f"note: {note}" for note in report.notes]
    return lines
