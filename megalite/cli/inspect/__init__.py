"""``megalite inspect``: what is in a dataset or a model, and which documents a step of a run trains on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from megalite.cli.plugin_option import Plugins, load_plugins
from megalite.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("inspect")(inspect)


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A dataset's prefix, a checkpoint, a folder of them, a Hugging Face folder, a run's folder or file.",
        ),
    ],
    step: Annotated[int | None, typer.Option(help="Of a run: the step whose documents are shown, from 1.")] = None,
    rank: Annotated[int | None, typer.Option(help="With --step: only what this rank trains on.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --step: a JSON line a sample, texts whole.")] = False,
    documents: Annotated[
        int | None, typer.Option(min=0, help="Of a dataset: how many documents are shown; 3 unless given.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Of a dataset: the tokenizer to decode them with.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Of a dataset: write the histogram as this PNG.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Of a checkpoint, or a folder's newest: check every file's digest.")
    ] = False,
    diff: Annotated[
        Path | None,
        typer.Option(help="Of a checkpoint, or a folder's newest: another to compare with; status 1 if they differ."),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Show and check a dataset, a checkpoint or a Hugging Face folder.

    Or show what a step of a run trains on, from its configuration.
    """
    from megalite.checkpoint.discovery import checkpoint_root
    from megalite.cli.inspect.checkpoint import (
        compare_checkpoints,
        inspect_checkpoint,
        is_checkpoint,
        list_folder,
        newest_checkpoint,
        verify_checkpoint,
    )
    from megalite.cli.inspect.dataset import inspect_dataset, is_dataset, nearest_prefix
    from megalite.cli.inspect.huggingface import inspect_hugging_face
    from megalite.cli.inspect.run import inspect_step
    from megalite.cli.run_without_checkpoint import require_checkpoint
    from megalite.convert.huggingface.reader import is_hugging_face
    from megalite.convert.open import open_weights

    load_plugins(plugin)
    of_run = {"--step": step is not None, "--rank": rank is not None, "--json": as_json}
    of_dataset = {
        "--documents": documents is not None,
        "--tokenizer": tokenizer is not None,
        "--plot": plot is not None,
    }
    of_checkpoint = {"--verify": verify, "--diff": diff is not None}
    root = checkpoint_root(path)
    if is_dataset(path):
        _refuse(path, "a dataset", of_run | of_checkpoint)
        inspect_dataset(path, 3 if documents is None else documents, tokenizer, plot)
    elif is_checkpoint(path) or (root is not None and any(of_checkpoint.values())):
        _refuse(path, "a checkpoint" if is_checkpoint(path) else "a folder of checkpoints", of_run | of_dataset)
        if diff is not None:
            if verify:
                raise UserError("--verify: stands beside --diff; ask for one after the other")
            raise typer.Exit(0 if compare_checkpoints(newest_checkpoint(path), newest_checkpoint(diff)) else 1)
        (verify_checkpoint if verify else inspect_checkpoint)(newest_checkpoint(path))
    elif root is not None and step is None:
        _refuse(path, "a folder of checkpoints", of_run | of_dataset)
        list_folder(root)
    elif is_hugging_face(path):
        _refuse(path, "a Hugging Face folder", of_run | of_dataset | of_checkpoint)
        inspect_hugging_face(path)
    elif (path / "config.yaml").is_file() or path.suffix in (".yaml", ".yml"):
        if step is None:
            require_checkpoint(path, "; --step N shows the documents of a step")
        _refuse(path, "a run", of_dataset | of_checkpoint)
        if step is None:
            raise UserError(f"{path}: is a run; say which step's documents to show: --step N")
        inspect_step(path, step, rank, as_json)
    else:
        require_checkpoint(path)
        if (path / "config.json").is_file():
            open_weights(path)  # says what is wrong with that file
        raise UserError(
            f"{path}: neither a dataset's prefix, a checkpoint, a Hugging Face folder, a run's folder nor a run file"
            f"{nearest_prefix(path)}"
        )


def _refuse(path: Path, what: str, given: Mapping[str, bool]) -> None:
    for option in (name for name, is_given in given.items() if is_given):
        raise UserError(f"{option}: {path} is {what}, of which it says nothing; leave it out")
