"""Model files: the tokenizer and generation files that are stored beside a model's weights."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megalite.errors import UserError

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
MODEL_FILES = (
    *("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"),
    *(TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, "chat_template.jinja", "chat_template.json", GENERATION_CONFIG),
)
TIKTOKEN_SUFFIX = ".tiktoken"
"""The suffix of a tiktoken vocabulary file; the name before it is the encoding's."""
_TEXTS = (".txt", ".jinja")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", TIKTOKEN_SUFFIX)


def model_files_among(folder: Path, names: Iterable[str]) -> Mapping[str, Path]:
    """Return the model files among a folder's files."""
    return {name: folder / name for name in names if name in MODEL_FILES or name.endswith(TIKTOKEN_SUFFIX)}


def tokenizer_name(names: Iterable[str]) -> str | None:
    """Return the name of the tokenizer file among a folder's files; None if there is none."""
    names = sorted(names)
    return next((name for kind in _TOKENIZERS for name in names if name.endswith(kind)), None)


def tokenizer_model_files(file: Path, name: str) -> dict[str, Path]:
    """Return a tokenizer's file, under the standard `name`, and the model files in its folder that belong to it.

    The files beside belong to the tokenizer only if `file` has the standard name; otherwise they may be those of
    another tokenizer. A second tokenizer that `tokenizer_name` would prefer to `name` is left out.
    """
    beside: Mapping[str, Path] = {}
    if file.name in (name, "vocab.json"):  # GPT-2's two files, which are stored as one tokenizer.json
        beside = model_files_among(file.parent, sorted(path.name for path in file.parent.iterdir() if path.is_file()))
    found = {**beside, name: file}
    while (first := tokenizer_name(found)) not in (None, name):
        del found[str(first)]
    return found


def run_model_files(tokenizer: Mapping[str, Path] | None, of_weights: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the contents of the model files that a run stores in its checkpoints, byte for byte.

    `tokenizer` are the files of the run's tokenizer, None if the run names no tokenizer; `of_weights` are the model
    files of the weights that the run starts from. The latter supply files that the tokenizer's folder lacks, unless
    they belong to another tokenizer: their token ids would mean other tokens.
    """
    if tokenizer is None:
        return dict(of_weights)
    own = {name: path.read_bytes() for name, path in tokenizer.items()}
    theirs = {name: content for name, content in of_weights.items() if name.endswith(_TOKENIZERS)}
    main = str(tokenizer_name(own))
    if theirs and own[main] not in theirs.values():
        return own
    settings = {name: content for name, content in of_weights.items() if name not in theirs}
    # generation_config.json is taken from the weights, every other file from the tokenizer.
    return settings | own | {name: settings[name] for name in (GENERATION_CONFIG,) if name in settings}


def require_readable(name: str, path: Path) -> None:
    """Raise UserError where a file that goes with weights under `name` is of no use to those who read it there."""
    if name.endswith(".json"):
        read_settings(path)
        return
    try:
        with path.open("rb") as file:
            content = file.read() if name.endswith(_TEXTS) else file.read(1)
        if name.endswith(_TEXTS):
            content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; mend or remove it") from error


def read_settings(path: Path | None) -> dict[str, Any]:
    """Return the object in a JSON model file; an empty object if `path` is None.

    Raises UserError if the file cannot be read or is not a JSON object.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; repair or remove the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; repair or remove the file")
    return content
