"""The files of a tokenizer as Hugging Face has them, from the files that go with weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.checkpoint.companions import GENERATION_CONFIG, TIKTOKEN_SUFFIX
from megalite.checkpoint.huggingface.files import read_json
from megalite.checkpoint.huggingface.sentencepiece import tokenizer_json
from megalite.errors import UserError

_CONFIG = "tokenizer_config.json"
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Files by their names, and what ``config.json`` says of the tokens: the keys end in ``_token_id``."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    token_ids: Mapping[str, Any] = field(default_factory=lambda: dict.fromkeys(_TOKEN_IDS))


def tokenizer_files(companions: Mapping[str, Path], vocab_size: int) -> TokenizerFiles:
    """Return what goes into a Hugging Face folder of the files that go with a model's weights.

    All are taken as they are. Where there is a sentencepiece model and nothing that says how transformers reads it, a
    ``tokenizer.json`` is made from it. Raises UserError where that cannot be had, and where the tokenizer has more ids
    than the model.
    """
    files = {name: path.read_bytes() for name, path in companions.items()}
    ids: dict[str, Any] = {}
    if "tokenizer.json" in companions:
        ids = _ids_in_json(companions["tokenizer.json"], files, vocab_size)
    elif "tokenizer.model" in companions and _CONFIG not in files:
        path = companions["tokenizer.model"]
        content, names, ids = tokenizer_json(files["tokenizer.model"], path)
        _require_fits(path, len(json.loads(content)["model"]["vocab"]), vocab_size)
        files |= {"tokenizer.json": content, _CONFIG: _config(names)}
    for path in companions.values():
        if path.name.endswith(TIKTOKEN_SUFFIX):
            raise UserError(
                f"{path}: transformers reads no tiktoken ranks of this kind; give the model's own tokenizer.json with "
                "--tokenizer, whose tokens are the same"
            )
    if GENERATION_CONFIG in companions:
        ids |= {key: value for key, value in read_json(companions[GENERATION_CONFIG]).items() if key in _TOKEN_IDS}
    return TokenizerFiles(files, {**dict.fromkeys(_TOKEN_IDS), **ids})


def _ids_in_json(path: Path, files: dict[str, bytes], vocab_size: int) -> dict[str, Any]:
    """Return the ids of the special tokens of a ``tokenizer.json``; give it the file without which none are known."""
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: is no tokenizer.json: {error}; give another --tokenizer") from error
    _require_fits(path, max(vocabulary.values(), default=-1) + 1, vocab_size)
    if _CONFIG not in files:
        end = next((name for name in _END_NAMES if name in vocabulary), None)
        files[_CONFIG] = _config({} if end is None else {"eos_token": end})
    config = json.loads(files[_CONFIG])
    ids = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if content in vocabulary:
            ids[f"{name}_id"] = vocabulary[content]
    return ids


def _require_fits(path: Path, ids: int, vocab_size: int) -> None:
    if ids > vocab_size:
        raise UserError(f"{path}: has {ids:,} token ids, the model {vocab_size:,}; give the model's own --tokenizer")


def _config(names: Mapping[str, str]) -> bytes:
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
