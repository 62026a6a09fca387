"""A model's tokenizer, with what goes before a text and what ends one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.checkpoint.companions import GENERATION_CONFIG, TIKTOKEN_SUFFIX
from megalite.checkpoint.weights import Weights
from megalite.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from megalite.errors import UserError

_STANDARD = ("tokenizer.json", "tokenizer.model")
_TOKENIZER_CONFIG = "tokenizer_config.json"


class Vocabulary:
    """A tokenizer; `leading` are the ids that every text begins with, `ends` those that end one."""

    def __init__(self, tokenizer: Tokenizer, leading: Sequence[int], ends: Sequence[int], model_size: int) -> None:
        self._tokenizer, self._leading = tokenizer, list(leading)
        # A model's vocabulary is often padded: what no tokenizer knows has no text.
        self._known = min(tokenizer.vocab_size, model_size)
        self._model_size = model_size
        self.ends = frozenset(ends)

    def encode(self, text: str, where: str) -> list[int]:
        """Return the token ids of a prompt; an empty one begins a document.

        Raises UserError, which begins with `where`, for ids beyond the model's, and where nothing begins a document.
        """
        ids = self._leading + self._tokenizer.encode(text)
        if not ids and self._tokenizer.eod_id is not None:
            ids = [self._tokenizer.eod_id]
        if not ids:
            raise UserError(f"{where}: is empty, and the vocabulary has no token that begins a document; give text")
        if max(ids) >= self._model_size:
            raise UserError(
                f"{where}: has token id {max(ids)}, and the model has vocab_size={self._model_size}; "
                "give the tokenizer that the model was trained with: --tokenizer"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; control tokens, and ids that the tokenizer has not, have none."""
        return self._tokenizer.decode([token for token in ids if token < self._known])

    def control_token(self, name: str) -> int | None:
        """Return the id of a control token, which no text shows; None where there is none of that name."""
        return self._tokenizer.control_tokens.get(name)


def open_vocabulary(weights: Weights, tokenizer: Path | None) -> Vocabulary:
    """Return a model's vocabulary from the files that go with the weights, or its tokenizer from `tokenizer` if given.

    Raises UserError where there is no tokenizer.
    """
    file = _file(weights) if tokenizer is None else tokenizer_file(tokenizer)
    loaded = load_tokenizer(file)
    beside = weights.companions if tokenizer is None else {path.name: path for path in file.parent.glob("*.json")}
    size = weights.model.vocab_size
    assert size is not None  # weights have a table of tokens
    ends = _ends(weights.companions.get(GENERATION_CONFIG), loaded)
    return Vocabulary(loaded, _leading(file, beside.get(_TOKENIZER_CONFIG), loaded), ends, size)


def _file(weights: Weights) -> Path:
    beside = weights.companions
    encodings = sorted(name for name in beside if name.endswith(TIKTOKEN_SUFFIX))
    for name in (*_STANDARD, *encodings):
        if name in beside:
            return beside[name]
    raise UserError(
        f"{weights.origin}: has no tokenizer with it (tokenizer.json, tokenizer.model or an encoding's .tiktoken); "
        "name the one that the model was trained with: --tokenizer PATH"
    )


def _leading(file: Path, config: Path | None, tokenizer: Tokenizer) -> list[int]:
    """Return the ids put before every text: what tokenizer_config.json says, else what tokenizer.json does."""
    told = _read(config)
    if isinstance(told.get("add_bos_token"), bool):
        name = told.get("bos_token")
        name = name.get("content") if isinstance(name, Mapping) else name
        token = tokenizer.token_id(name) if told["add_bos_token"] and isinstance(name, str) else None
        if told["add_bos_token"] and token is None:
            raise UserError(f"{config}: add_bos_token asks for bos_token={name!r}, which {file} has not; mend either")
        return [] if token is None else [token]
    return _put_before(file) if file.suffix == ".json" else []


def _put_before(file: Path) -> list[int]:
    """Return what the post-processor of a tokenizer.json puts before a text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bare, dressed = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    start = next((at for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare), 0)
    return dressed[:start]


def _ends(config: Path | None, tokenizer: Tokenizer) -> list[int]:
    declared = _read(config).get("eos_token_id")
    declared = declared if isinstance(declared, list) else [declared]
    return [token for token in (*declared, tokenizer.eod_id) if isinstance(token, int)]


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; mend or remove it") from error
    return content if isinstance(content, dict) else {}
