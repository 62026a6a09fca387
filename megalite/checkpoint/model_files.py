"""The small files that go with a model's weights wherever these go: its tokenizer, and how to generate with it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megalite.errors import UserError

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
COMPANIONS = (
    *("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"),
    *(TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, "chat_template.jinja", "chat_template.json", GENERATION_CONFIG),
)
TIKTOKEN_SUFFIX = ".tiktoken"
"""How the name of a file of tiktoken's ranks ends, before which its encoding's name stands."""
_TEXTS = (".txt", ".jinja")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", TIKTOKEN_SUFFIX)


def companions_among(folder: Path, names: Iterable[str]) -> Mapping[str, Path]:
    """Return those of a folder's files that go with the weights."""
    return {name: folder / name for name in names if name in COMPANIONS or name.endswith(TIKTOKEN_SUFFIX)}


def tokenizer_name(names: Iterable[str]) -> str | None:
    """Return which of a folder's files is its tokenizer: the one that is looked for first; None where there is none."""
    names = sorted(names)
    return next((name for kind in _TOKENIZERS for name in names if name.endswith(kind)), None)


def tokenizer_companions(file: Path, name: str) -> dict[str, Path]:
    """Return a tokenizer's file, which goes under `name`, and the files that lie beside it and belong to it.

    Files belong to a tokenizer of the name under which a folder's tokenizer is looked for. Beside a file of any other
    name, the files may be those of another tokenizer. A second tokenizer that would be found before `file` is left out.
    """
    beside: Mapping[str, Path] = {}
    if file.name in (name, "vocab.json"):  # GPT-2's two files, which go as one tokenizer.json
        beside = companions_among(file.parent, sorted(path.name for path in file.parent.iterdir() if path.is_file()))
    found = {**beside, name: file}
    while (first := tokenizer_name(found)) not in (None, name):
        del found[str(first)]
    return found


def run_companions(tokenizer: Mapping[str, Path] | None, of_weights: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files that go with the checkpoints of a run, byte for byte as they are.

    `tokenizer` are the files of the run's tokenizer, None where the run names none; `of_weights` are those of the
    weights that it begins with. These fill in what the tokenizer's folder lacks, unless they are of another tokenizer:
    their numbers would stand for other tokens.
    """
    if tokenizer is None:
        return dict(of_weights)
    own = {name: path.read_bytes() for name, path in tokenizer.items()}
    theirs = {name: content for name, content in of_weights.items() if name.endswith(_TOKENIZERS)}
    main = str(tokenizer_name(own))
    if theirs and own[main] not in theirs.values():
        return own
    settings = {name: content for name, content in of_weights.items() if name not in theirs}
    # How generation ends belongs to the weights; all else to the tokenizer.
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
    """Return the object in a JSON file that goes with weights, an empty one where there is no file.

    Raises UserError where the file cannot be read, or holds something else.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; mend or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; mend or remove it")
    return content
