"""``megalite convert``: a model between Hugging Face's folders and checkpoints, from Megatron's too."""

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalite.cli.plugin_option import Plugins, load_plugins
from megalite.cli.progress import byte_progress
from megalite.errors import UserError

if TYPE_CHECKING:
    from megalite.model.weights import Weights

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class Target(StrEnum):
    """What is written."""

    hf = "hf"
    megalite = "megalite"


class Precision(StrEnum):
    """In which elements are stored."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("convert")(convert)


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A Hugging Face or Megatron folder, a checkpoint, or a run's folder."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write, which must not exist.")],
    to: Annotated[
        Target | None, typer.Option(help="Megalite's own checkpoints go to hf, all else to megalite.")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of a Hugging Face folder; the source's own unless given.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run both models on the same tokens, and refuse a difference above 1e-4.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer's file or folder, in the place of the source's own.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a Hugging Face folder's files, as 500MB or 5GB.")] = "5GB",
    max_positions: Annotated[
        int | None, typer.Option(min=1, help="Shorten the longest sequence of a Hugging Face model with a window.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Of a Megatron checkpoint: a run file, or its section model, before the options it tells."),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Convert a model: a Hugging Face folder into a checkpoint, and a checkpoint into a Hugging Face folder."""
    from megalite.checkpoint.model_files import TIKTOKEN_SUFFIX
    from megalite.checkpoint.weights import CheckpointWeights
    from megalite.cli.run_without_checkpoint import require_checkpoint
    from megalite.convert.conversion import RoundedWeights, growing, size_of, to_checkpoint, to_hugging_face
    from megalite.convert.huggingface.reader import HuggingFaceWeights
    from megalite.files import writing
    from megalite.generation.tokenization import untrained_beginning

    shard_bytes = _bytes(max_shard_size)
    load_plugins(plugin)
    require_checkpoint(source)
    weights = _open(source, max_positions, model)
    target = to or (Target.hf if isinstance(weights, CheckpointWeights) else Target.megalite)
    if target is Target.megalite and dtype is not None:
        raise UserError(f"--dtype={dtype}: a checkpoint holds fp32 whatever was read; leave it out, or use --to hf")
    precision = dtype.value if dtype else weights.precision
    if verify:
        _require_verifiable(weights, target)
    if isinstance(weights, CheckpointWeights):
        with byte_progress("checking") as progress:
            weights.reader.require_intact(progress)
    model_files = weights.model_files if tokenizer is None else _with_tokenizer(weights.model_files, tokenizer)
    needed = size_of(weights, precision if target is Target.hf else "fp32")
    with writing(output, "give another OUTPUT, or make room"), growing(output, needed) as unfinished:
        with byte_progress("converting") as progress:
            if target is Target.megalite:
                to_checkpoint(weights, model_files, unfinished, progress)
            else:
                to_hugging_face(
                    weights, model_files, unfinished, progress, precision=precision, max_shard_bytes=shard_bytes
                )
        if not verify:
            proof = ""
        elif target is Target.hf:
            proof = _proof(RoundedWeights(weights, precision), unfinished, output)
        else:
            assert isinstance(weights, HuggingFaceWeights)
            proof = _proof(_open(unfinished), weights.origin, output)
    for note in getattr(weights, "notes", ()):
        typer.echo(f"note: {note}")
    if target is Target.hf and (beginning := untrained_beginning(weights, model_files)):
        typer.echo(
            f"note: the tokenizer puts {' '.join(beginning)} before every text, and no training document had it; in "
            "transformers encode prompts with add_special_tokens=False"
        )
    elements = size_of(weights, "fp32") // 4
    form = "a checkpoint" if target is Target.megalite else f"a Hugging Face folder in {precision}"
    typer.echo(f"{output}: {elements:,} parameters, {needed / 1e6:,.1f} MB, {form}{proof}")
    if not any(name.startswith(("tokenizer.", "vocab.")) or name.endswith(TIKTOKEN_SUFFIX) for name in model_files):
        typer.echo("there is no tokenizer with it: give one with --tokenizer")


def _open(source: Path, max_positions: int | None = None, model: Path | None = None) -> "Weights":
    from megalite.convert.huggingface.reader import HuggingFaceWeights, is_hugging_face
    from megalite.convert.megatron.reader import MegatronWeights
    from megalite.convert.megatron.state_dict import checkpoint_folder
    from megalite.convert.open import open_weights

    if max_positions is not None and not is_hugging_face(source):
        raise UserError(f"--max-positions={max_positions}: belongs to Hugging Face folders, {source} is none")
    if model is not None and checkpoint_folder(source) is None:
        raise UserError(f"--model={model}: belongs to Megatron's checkpoints, {source} is none")
    if model is not None:
        return MegatronWeights(source, model)
    return open_weights(source) if max_positions is None else HuggingFaceWeights(source, max_positions=max_positions)


def _with_tokenizer(model_files: Mapping[str, Path], path: Path) -> dict[str, Path]:
    """Return the files that go along with those of a tokenizer in the place of the source's."""
    from megalite.checkpoint.model_files import GENERATION_CONFIG, model_files_among
    from megalite.data.tokenizers.load import load_tokenizer, tokenizer_paths

    load_tokenizer(path)
    if path.is_dir():
        given = dict(model_files_among(path, sorted(file.name for file in path.iterdir() if file.is_file())))
    else:
        given = tokenizer_paths(path)
    # How generation ends belongs to the weights; only where they tell nothing it is that of the tokenizer's folder.
    kept = {name: file for name, file in model_files.items() if name == GENERATION_CONFIG}
    return given | kept


def _require_verifiable(weights: "Weights", target: Target) -> None:
    from megalite.convert.huggingface.reader import HuggingFaceWeights
    from megalite.convert.logits_check import require_transformers

    if target is Target.megalite and not isinstance(weights, HuggingFaceWeights):
        raise UserError(
            f"--verify: compares with transformers, which reads neither {weights.origin} nor a checkpoint; use --to hf"
        )
    require_transformers()


def _proof(weights: "Weights", hugging_face: Path, output: Path) -> str:
    from megalite.convert.logits_check import TOLERANCE, largest_difference

    with byte_progress("verifying") as progress:
        difference, tokens = largest_difference(weights, hugging_face, progress)
    told = f"the logits of {tokens} tokens differ by at most {difference:.2e}"
    if not difference <= TOLERANCE:
        raise UserError(
            f"{output}: not written: {told}, and {TOLERANCE:.0e} is allowed in fp32; the two do not compute the same "
            "function, or the source's weights are too large for fp32: convert without --verify to look at it"
        )
    return f"; verified, {told}"


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]i?B)?", size.strip(), re.IGNORECASE)
    count = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if count < 1:
        raise UserError(f"--max-shard-size={size}: is no size; give one such as 500MB or 5GB")
    return count
