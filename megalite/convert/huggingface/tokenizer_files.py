"""The files of a tokenizer as Hugging Face has them, from the files that go with weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.checkpoint.model_files import (
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    TIKTOKEN_SUFFIX,
    TOKENIZER_CONFIG,
    read_settings,
)
from megalite.checkpoint.special_tokens import TOKEN_IDS, DocumentTokens, declared_end_ids, end_token_ids, named_token
from megalite.convert.huggingface.sentencepiece_export import tokenizer_json
from megalite.errors import UserError

_ADDED_TOKENS = "added_tokens.json"
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Files by their names, and what ``config.json`` says of the tokens: the keys end in ``_token_id``."""

    files: Mapping[str, bytes]
    token_ids: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The ids of names, and the special tokens that the tokenizer's file itself tells: ``eos_token`` and such."""

    ids: Mapping[str, int]
    special: Mapping[str, str]

    @property
    def usual_end(self) -> int | None:
        """The end that the vocabulary suggests: what its file tells, else the first of the usual names that it has."""
        names = (*filter(None, (self.special.get("eos_token"),)), *_END_NAMES)
        return next((self.ids[name] for name in names if name in self.ids), None)


def tokenizer_files(
    model_files: Mapping[str, Path],
    vocab_size: int,
    *,
    settings: Mapping[str, Any] | None = None,
    where: str = GENERATION_CONFIG,
    documents: DocumentTokens | None = None,
) -> TokenizerFiles:
    """Return what goes into a Hugging Face folder of the files that go with a model's weights.

    All are taken as they are, but for a ``generation_config.json`` whose ``eos_token_id`` does not name all tokens that
    end a text: these are added, so that transformers ends where megalite does. `settings` are the generation settings,
    and `where` is the file that they stand in. `documents` tells what stood around the training documents.

    Where there is a sentencepiece model and nothing that says how transformers reads it, a ``tokenizer.json`` is made
    from it. Raises UserError where that cannot be had, and where the tokenizer has more ids than the model.
    """
    if settings is None:
        settings = read_settings(model_files.get(GENERATION_CONFIG))
    files = {name: path.read_bytes() for name, path in model_files.items()}
    vocabulary = _Vocabulary({}, {})
    if "tokenizer.json" in model_files:
        vocabulary = _json_vocabulary(model_files["tokenizer.json"], vocab_size)
    elif "tokenizer.model" in model_files and TOKENIZER_CONFIG in files:
        vocabulary = _sentencepiece_vocabulary(model_files, vocab_size)
    elif "tokenizer.model" in model_files:
        path = model_files["tokenizer.model"]
        files["tokenizer.json"], special, _ = tokenizer_json(files["tokenizer.model"], path)
        ids = json.loads(files["tokenizer.json"])["model"]["vocab"]
        _require_fits(path, len(ids), vocab_size)
        vocabulary = _Vocabulary(ids, special)
    for path in model_files.values():
        if path.name.endswith(TIKTOKEN_SUFFIX):
            raise UserError(
                f"{path}: transformers reads no tiktoken ranks of this kind; give the model's own tokenizer.json with "
                "--tokenizer, whose tokens are the same"
            )
    told = tuple(read_settings(model_files.get(name)) for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP))
    declared = declared_end_ids(settings, vocab_size, where)
    ends = end_token_ids(declared, told, vocabulary.ids.get, vocabulary.usual_end, documents)
    token_ids = _token_ids(settings, told, vocabulary) | {"eos_token_id": _one_or_several(settings, ends)}
    if "tokenizer.json" in files and TOKENIZER_CONFIG not in files:
        files[TOKENIZER_CONFIG] = _tokenizer_config(vocabulary, told, ends)
    if GENERATION_CONFIG in files and ends != declared:
        files[GENERATION_CONFIG] = _json({**settings, "eos_token_id": token_ids["eos_token_id"]})
    return TokenizerFiles(files, token_ids)


def _token_ids(
    settings: Mapping[str, Any], told: tuple[Mapping[str, Any], ...], vocabulary: _Vocabulary
) -> dict[str, Any]:
    """Return the ids of the special tokens: those of the generation settings, else the tokenizer's by their names."""
    ids: dict[str, Any] = {}
    for key in TOKEN_IDS:
        name = named_token(key.removesuffix("_id"), *told, vocabulary.special)
        ids[key] = settings.get(key) if settings.get(key) is not None else vocabulary.ids.get(name or "")
    return ids


def _one_or_several(settings: Mapping[str, Any], ends: list[int]) -> int | list[int] | None:
    if len(ends) == 1 and not isinstance(settings.get("eos_token_id"), list):
        return ends[0]
    return ends or None


def _tokenizer_config(vocabulary: _Vocabulary, told: tuple[Mapping[str, Any], ...], ends: list[int]) -> bytes:
    """Make a ``tokenizer_config.json``, without which transformers knows no special token by its role."""
    named = {key: named_token(key, *told, vocabulary.special) for key in ("bos_token", "eos_token", "unk_token")}
    if named["eos_token"] is None and ends:
        named["eos_token"] = next((name for name, token in vocabulary.ids.items() if token == ends[0]), None)
    names = {key: name for key, name in named.items() if name is not None}
    return _json({"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False})


def _json_vocabulary(path: Path, vocab_size: int) -> _Vocabulary:
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_str(path.read_text(encoding="utf-8")).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: is no tokenizer.json: {error}; give another --tokenizer") from error
    _require_fits(path, max(ids.values(), default=-1) + 1, vocab_size)
    return _Vocabulary(ids, {})


def _sentencepiece_vocabulary(model_files: Mapping[str, Path], vocab_size: int) -> _Vocabulary:
    """Return the ids of a sentencepiece model and of the tokens that are added to it in files of their own."""
    from sentencepiece import SentencePieceProcessor

    path = model_files["tokenizer.model"]
    try:
        processor: Any = SentencePieceProcessor(model_proto=path.read_bytes())  # pyright: ignore[reportCallIssue]
    except RuntimeError as error:
        raise UserError(f"{path}: is no sentencepiece model: {error}; give another --tokenizer") from error
    ids = {processor.id_to_piece(token): token for token in range(processor.vocab_size())}
    where = model_files.get(_ADDED_TOKENS)
    for name, token in read_settings(where).items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise UserError(f"{where}: {name!r} has the id {token!r}; write a whole number of 0 or more")
        ids[name] = token
    _require_fits(where or path, max(ids.values(), default=-1) + 1, vocab_size)
    special = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    return _Vocabulary(ids, {key: processor.id_to_piece(token) for key, token in special.items() if token >= 0})


def _require_fits(path: Path, ids: int, vocab_size: int) -> None:
    if ids > vocab_size:
        raise UserError(f"{path}: has {ids:,} token ids, the model {vocab_size:,}; give the model's own --tokenizer")


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
