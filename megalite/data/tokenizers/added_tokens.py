"""Tokens that files beside a ``tokenizer.model`` add to it: ``added_tokens.json``, ``tokenizer_config.json``.

As transformers does, a text is cut at their names, wherever they stand, and the model encodes what is between.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.tokenizers.control_tokens import END_OF_DOCUMENT_NAMES, end_of_document, looks_like_control
from megalite.data.tokenizers.inner_text import InnerText
from megalite.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megalite.data.tokenizers.tokenizer_config import NAME as TOKENIZER_CONFIG
from megalite.data.tokenizers.tokenizer_config import read_object
from megalite.errors import UserError

ADDED_TOKENS = "added_tokens.json"
_MODEL = "tokenizer.model"
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beyond the model's own."""

    name: str
    token: int
    special: bool


def added_tokens_beside(file: Path) -> tuple[AddedToken, ...]:
    """Return what is added to a ``tokenizer.model`` by the files beside it, by their ids; a file of another name stands
    alone.

    Raises UserError for a file that is broken, and for an id that is no number from 0 on or has two names.
    """
    if file.name != _MODEL:
        return ()
    config_file, added_file = file.with_name(TOKENIZER_CONFIG), file.with_name(ADDED_TOKENS)
    config, added = read_object(config_file), read_object(added_file)
    special = set(_names(config, read_object(file.with_name("special_tokens_map.json"))))
    found: dict[str, tuple[Path, Any]] = {name: (added_file, token) for name, token in added.items()}
    decoder = config.get("added_tokens_decoder")
    for token, entry in (decoder if isinstance(decoder, Mapping) else {}).items():
        name = entry.get("content") if isinstance(entry, Mapping) else None
        if not isinstance(name, str):
            raise UserError(f"{config_file}: added_tokens_decoder.{token} has no text as its content; mend it")
        if entry.get("special") is True:
            special.add(name)
        found[name] = (config_file, int(token) if token.isdecimal() else token)
    tokens: dict[int, AddedToken] = {}
    for name, (path, token) in found.items():
        if not name or not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 1 << 31:
            raise UserError(f"{path}: token {name!r} has id {token!r}; an id is a whole number from 0 on, of a name")
        if token in tokens:
            raise UserError(f"{path}: id {token} is that of {tokens[token].name!r} and of {name!r}; mend it")
        tokens[token] = AddedToken(name, token, name in special)
    return tuple(tokens[token] for token in sorted(tokens))


def added_tokens_file(added: Iterable[AddedToken]) -> bytes:
    """Return an ``added_tokens.json`` of these tokens."""
    return json.dumps({one.name: one.token for one in added}, ensure_ascii=False).encode()


def with_added_tokens(model: SentencePieceTokenizer, file: Path) -> "SentencePieceTokenizer | AddedTokens":
    """Return a model with what the files beside add to it; the model itself where that is nothing.

    A token with the id of one of the model's own pieces is not added; that is noted where it has another name.
    """
    added = added_tokens_beside(file)
    beyond = [one for one in added if one.token >= model.vocab_size]
    model.notes = tuple(
        f"{one.name!r}, which a file beside adds as id {one.token}, is not read: the id is that of "
        f"{model.token_name(one.token)!r}"
        for one in added
        if one.token < model.vocab_size and model.token_name(one.token) != one.name
    )
    return AddedTokens(model, beyond) if beyond else model


class AddedTokens:
    """A sentencepiece model with tokens beyond its own, which `encode` reads in text."""

    def __init__(self, model: SentencePieceTokenizer, added: Sequence[AddedToken]) -> None:
        self._model = model
        self._ids = {one.name: one.token for one in added}
        self._names = {token: name for name, token in self._ids.items()}
        self._special = {one.name for one in added if one.special}
        control = {one.name: one.token for one in added if one.special or looks_like_control(one.name)}
        self.vocab_size = max(model.vocab_size, max(self._names) + 1)
        self.control_tokens: dict[str, int] = {**model.control_tokens, **control}
        known = end_of_document(self.control_tokens)
        self.eod_id = model.eod_id if known is None else known
        self.bos_id, self.leading_id, self.unknown_id = model.bos_id, model.leading_id, model.unknown_id
        self.notes = model.notes
        told = json.dumps(sorted(self._names.items()))
        self.digest = hashlib.sha256(f"{model.digest} {told}".encode()).hexdigest()
        self._encoders: dict[frozenset[str], Callable[[str], list[int]]] = {}
        self._inner: InnerText | None = None

    def token_id(self, name: str) -> int | None:
        """Return the id of a piece, control token or added token by its exact name."""
        return self._ids[name] if name in self._ids else self._model.token_id(name)

    def token_name(self, token: int) -> str | None:
        """Return the name of a piece, control token or added token by its id."""
        return self._names.get(token) or self._model.token_name(token)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, in which added tokens are read, with none added before or after."""
        return self._without(())(text)

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text in which names of control tokens stay text."""
        return self._without(self.control_tokens)(text)

    def message_encoder(self, names: Iterable[str]) -> Callable[[str], list[int]]:
        """Return an encoder of messages: of the added tokens it reads those that neither are special nor in `names`."""
        return self._without({*self._special, *END_OF_DOCUMENT_NAMES, *names})

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text as int32[tokens]."""
        return [
            np.array(self.encode(text), dtype=np.int32)
            if any(name in text for name in self._ids)
            else self._model.encode_arrays([text])[0]
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens have none."""
        parts: list[str] = []
        for name, run in groupby(ids, self._names.get):
            tokens = list(run)
            if name is not None:
                parts += [name if name not in self._special else ""] * len(tokens)
                continue
            tokens = [token for token in tokens if token < self._model.vocab_size]
            text = self._within().decode(tokens) if parts else None
            parts.append(self._model.decode(tokens) if text is None else text)
        return "".join(parts)

    def _within(self) -> InnerText:
        if self._inner is None:
            self._inner = InnerText(self._model, self._model.encode)
        return self._inner

    def _without(self, names: Iterable[str]) -> Callable[[str], list[int]]:
        """Return an encoder that reads none of these names, neither as an added token nor as the model's symbol."""
        kept = frozenset(names)
        if kept not in self._encoders:
            bare = self._model.message_encoder(kept) if kept else self._model.encode
            inner = InnerText(self._model, bare)
            read = sorted((name for name in self._ids if name not in kept), key=len, reverse=True)
            cut = re.compile(f"({'|'.join(map(re.escape, read))})") if read else None

            def encode(text: str) -> list[int]:
                ids: list[int] = []
                for at, part in enumerate(cut.split(text) if cut else [text]):
                    if at % 2:
                        ids.append(self._ids[part])
                    elif part:
                        ids += inner.encode(part) if at else bare(part)
                return ids

            self._encoders[kept] = encode
        return self._encoders[kept]


def _names(*contents: Mapping[str, Any]) -> Iterable[str]:
    """Yield the names of special tokens, which may be written as texts or as records, alone or in lists."""
    for content in contents:
        for key in _SPECIAL_KEYS:
            value = content.get(key)
            for one in value if isinstance(value, list) else [value]:
                name = one.get("content") if isinstance(one, Mapping) else one
                if isinstance(name, str):
                    yield name
