"""GPT-2's two files, ``vocab.json`` and ``merges.txt``, as one ``tokenizer.json``: byte-level BPE (GPT-2, 2019)."""

import json
from pathlib import Path

from megalite.data.tokenizers.control_tokens import END_OF_DOCUMENT
from megalite.data.tokenizers.tokenizer_config import read_object
from megalite.errors import UserError
from megalite.text_encoding import read_utf8

NAMES = ("vocab.json", "merges.txt")
_VERSION_LINE = "#version"


def as_tokenizer_json(file: Path) -> bytes:
    """Return the ``tokenizer.json`` of the two files, one of which is `file`, the other beside it.

    The same files always give the same bytes. ``<|endoftext|>`` of the vocabulary is its special token. Raises
    UserError where one is missing, and for what is no vocabulary or no list of merges.
    """
    vocabulary_file, merges_file = (file.with_name(name) for name in NAMES)
    return tokenizer_json(vocabulary_file, merges_file)


def tokenizer_json(vocabulary_file: Path, merges_file: Path) -> bytes:
    """Return the ``tokenizer.json`` of two files of any names; raise UserError as `as_tokenizer_json`."""
    for path in (vocabulary_file, merges_file):
        if not path.is_file():
            raise UserError(f"{path}: no such file; GPT-2's tokenizer is a vocab.json and a merges.txt, side by side")
    vocabulary = _vocabulary(vocabulary_file)
    special = [END_OF_DOCUMENT] if END_OF_DOCUMENT in vocabulary else []
    by_letter = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocabulary[name],
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **by_letter},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **by_letter},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": _merges(merges_file, vocabulary),
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary = read_object(path)
    if not vocabulary:
        raise UserError(f"{path}: holds no token; give GPT-2's vocab.json, an object of tokens and their ids")
    owners: dict[int, str] = {}
    for name, token in vocabulary.items():
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 1 << 31:
            raise UserError(f"{path}: token {name[:40]!r} has id {str(token)[:40]}; an id is a whole number from 0 on")
        if owners.setdefault(token, name) != name:
            raise UserError(f"{path}: id {token} is that of {owners[token][:40]!r} and of {name[:40]!r}; mend it")
    return vocabulary


def _merges(path: Path, vocabulary: dict[str, int]) -> list[list[str]]:
    try:
        lines = read_utf8(path).split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8; give GPT-2's merges.txt") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip() or (number == 1 and line.startswith(_VERSION_LINE)):
            continue
        pair = line.split(" ")
        known = len(pair) == 2 and all(piece in vocabulary for piece in (*pair, "".join(pair)))
        if not known:
            raise UserError(
                f"{path}:{number}: {line[:60]!r} is no merge of two tokens of the vocab.json beside; give the two "
                "files that belong together"
            )
        merges.append(pair)
    return merges
