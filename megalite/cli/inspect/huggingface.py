"""What is in a Hugging Face folder: its model, its files, its tokenizer, what ends a text of it, its tensors."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megalite.cli.columns import table
from megalite.cli.inspect.checkpoint import by_x

if TYPE_CHECKING:
    from megalite.convert.huggingface.reader import HuggingFaceWeights


def inspect_hugging_face(path: Path) -> None:
    """Print what a folder holds; raise UserError where megalite cannot compute its model, or files are not whole."""
    from megalite.convert.huggingface.reader import HuggingFaceWeights

    weights = HuggingFaceWeights(path)
    for line in (*_head(weights), *_tokenizer(weights), *_tensors(weights)):
        typer.echo(line)


def _head(weights: "HuggingFaceWeights") -> Iterator[str]:
    files = [*weights.files, *weights.model_files]
    sizes = {name: (weights.origin / name).stat().st_size for name in files}
    yield (
        f"{weights.origin}: a {weights.format.model_type} of Hugging Face's, "
        f"{sum(map(prod, weights.shapes.values())):,} parameters, {len(weights.stored):,} tensors, "
        f"{sum(sizes[name] for name in weights.files) / 1e6:,.1f} MB"
    )
    yield f"precision: {weights.precision}"
    settings = weights.model.model_dump(mode="json", exclude_none=True)
    yield f"model: {', '.join(f'{key} {value}' for key, value in settings.items())}"
    rows = [("files:" if not n else "", name, f"{size:,}") for n, (name, size) in enumerate(sorted(sizes.items()))]
    yield from table(rows, right=(2,))
    yield from weights.notes


def _tokenizer(weights: "HuggingFaceWeights") -> Iterator[str]:
    from megalite.checkpoint.model_files import TOKENIZER_CONFIG, read_settings, tokenizer_name
    from megalite.convert.generation_config import generation_settings
    from megalite.data.tokenizers.load import load_tokenizer
    from megalite.generation.tokenization import open_vocabulary

    model_files = weights.model_files
    name = tokenizer_name(model_files)
    settings, where = generation_settings(weights, model_files)
    if name is None:
        yield "tokenizer: none"
        yield f"ends a text: {settings.get('eos_token_id')} of {Path(where).name}"
        return
    loaded = load_tokenizer(model_files[name])
    yield f"tokenizer: {name}, {loaded.vocab_size:,} ids, SHA-256 {loaded.digest[:12]}"
    separate = next((file for file in model_files if file.startswith("chat_template")), None)
    in_config = TOKENIZER_CONFIG if read_settings(model_files.get(TOKENIZER_CONFIG)).get("chat_template") else None
    yield f"chat template: {separate or in_config or 'none'}"
    vocabulary, names = open_vocabulary(weights, None), {token: name for name, token in loaded.control_tokens.items()}

    def told(ids: list[int]) -> str:
        return ", ".join(f"{token} {names[token]}" if token in names else str(token) for token in ids) or "nothing"

    yield f"begins a text: {told(vocabulary.leading)}"
    source = Path(where).name if settings.get("eos_token_id") is not None else "the tokenizer"
    yield f"ends a text: {told(sorted(vocabulary.ends))}, by {source}"


def _tensors(weights: "HuggingFaceWeights") -> Iterator[str]:
    yield ""
    yield from table([(name, by_x(shape), dtype) for name, (shape, dtype) in weights.stored.items()])
