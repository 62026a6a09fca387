"""``megalite tokenizer train``: a sentencepiece tokenizer from text."""

from pathlib import Path
from typing import Annotated

import typer

from megalite.cli.argument_types import file_name
from megalite.cli.progress import byte_progress


def register(app: typer.Typer) -> None:
    """Add the verb."""
    verbs = typer.Typer(help="Make a tokenizer.", no_args_is_help=True)
    verbs.callback()(_group)
    verbs.command("train")(train)
    app.add_typer(verbs, name="tokenizer")


def _group() -> None:
    """Make a tokenizer."""


def train(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT", help="Text, as preprocess reads it: files, folders, quoted patterns."),
    ],
    output: Annotated[Path, typer.Option(parser=file_name, metavar="FILE", help="The model to write, say tok.model.")],
    vocab_size: Annotated[int, typer.Option(help="Number of token ids, bytes and control tokens included.")] = 8192,
    text_key: Annotated[str, typer.Option(help="The key or column of the text.")] = "text",
    control_token: Annotated[
        list[str] | None,
        typer.Option(help="A control token such as <|im_start|>, which no text becomes; may be given several times."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the sample of documents, where there are over 100 MB.")] = 1234,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Train a sentencepiece BPE tokenizer with byte fallback, which gives every text back as it was."""
    from megalite.data.tokenizers.train_sentencepiece import train_sentencepiece
    from megalite.files import writing

    with writing(output, "give another --output"), byte_progress("reading") as progress:
        report = train_sentencepiece(
            inputs,
            vocab_size=vocab_size,
            output=output,
            text_key=text_key,
            seed=seed,
            control_tokens=control_token or (),
            overwrite=force,
            progress=progress,
        )
    used = "" if report.documents_used == report.documents else f" of {report.documents:,}"
    typer.echo(
        f"{output}: {vocab_size:,} token ids from {report.documents_used:,}{used} documents, "
        f"{report.text_bytes_used / 1e6:.2f} MB, trained in {report.seconds:.1f} s"
    )
