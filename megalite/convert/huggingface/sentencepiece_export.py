"""A sentencepiece BPE model as Hugging Face's ``tokenizer.json``, proved equal on probes before it is given out."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalite.errors import UserError

SPACE = "\u2581"
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_PROBES = 2000
_TEXTS = (
    "Hello, world! ",
    "  two spaces, then three   and a tab\tand lines\n\n\n  indented\r\n",
    "3.14159 1,234,567 x=1e-9; naïve façade Größe Ærø — “quotes” … 日本語のテキスト 한국어 🙂👩‍👩‍👧 ﬁ ① ½ é e\u0301",
    "aaaaaaaaaaaaaaaa bbbbbbbb ababababab !!!!!!!!!! ---------- ________",
    f"{SPACE}a mark{SPACE}{SPACE}of spaces \u00a0\u3000\u200b\u0001\ufffd",
)


def tokenizer_json(model: bytes, path: Path) -> tuple[bytes, dict[str, str], dict[str, int]]:
    """Return the ``tokenizer.json`` of a sentencepiece model, the names of its special tokens, and their ids.

    The keys are ``bos_token``, ``eos_token`` and ``unk_token``, and ``bos_token_id`` and ``eos_token_id``. Raises
    UserError for a model that is no BPE, and for one whose ids are not found again on all probes.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from tokenizers import Tokenizer

    proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] (made when imported)
    proto.ParseFromString(model)
    processor: Any = SentencePieceProcessor(model_proto=model)
    _require_bpe(proto, path)
    content = json.dumps(_content(proto), ensure_ascii=False, indent=2).encode()
    theirs = Tokenizer.from_str(content.decode())
    for text in _probes(proto):
        if processor.encode(text) != theirs.encode(text, add_special_tokens=False).ids:
            raise UserError(
                f"{path}: its tokens are not those of the tokenizer.json made from it, on {text[:60]!r} say; give the "
                "model's own tokenizer.json with --tokenizer"
            )
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    names = {name: processor.id_to_piece(token) for name, token in ids.items() if token >= 0}
    return content, names, {f"{name}_id": ids[name] for name in names if name != "unk_token"}


def _require_bpe(proto: Any, path: Path) -> None:
    kind = _MODEL_TYPES.get(proto.trainer_spec.model_type, "unknown")
    if kind != "BPE":
        raise UserError(
            f"{path}: a sentencepiece model of the kind {kind}, which no tokenizer.json gives the same tokens as in "
            "every text; give the model's own tokenizer.json with --tokenizer, or train with a BPE one"
        )
    unlike = {
        "trainer_spec.treat_whitespace_as_suffix": proto.trainer_spec.treat_whitespace_as_suffix,
        "normalizer_spec.escape_whitespaces=false": not proto.normalizer_spec.escape_whitespaces,
        "unused pieces": any(piece.type == piece.UNUSED for piece in proto.pieces),
    }
    for name, found in unlike.items():
        if found:
            raise UserError(f"{path}: a sentencepiece model with {name}, for which tokenizer.json has no equal")


def _content(proto: Any) -> dict[str, Any]:
    vocabulary = {piece.piece: token for token, piece in enumerate(proto.pieces)}
    unknown = next(piece.piece for piece in proto.pieces if piece.type == piece.UNKNOWN)
    prefix = proto.normalizer_spec.add_dummy_prefix
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(proto)),
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(proto))},
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == piece.BYTE for piece in proto.pieces),
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(proto),
        },
    }


def _added_tokens(proto: Any) -> Iterator[dict[str, Any]]:
    """Yield the pieces that stand whole in a text, or in none.

    They are looked for once the text is normalised: else each stretch between them would be, with a prefix of its own.
    """
    for token, piece in enumerate(proto.pieces):
        if piece.type in (piece.CONTROL, piece.UNKNOWN, piece.USER_DEFINED):
            yield {
                "id": token,
                "content": piece.piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": True,
                "special": piece.type != piece.USER_DEFINED,
            }


def _normalizers(proto: Any) -> Iterator[dict[str, Any]]:
    from base64 import b64encode

    spec = proto.normalizer_spec
    if spec.precompiled_charsmap:
        yield {"type": "Precompiled", "precompiled_charsmap": b64encode(spec.precompiled_charsmap).decode()}
    marks = f" {SPACE}"
    if spec.remove_extra_whitespaces:
        # A space left at the beginning stands for the prefix.
        marks = SPACE
        ends = f"[ {SPACE}]+\\z" if spec.add_dummy_prefix else f"\\A +|[ {SPACE}]+\\z"
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        yield {"type": "Replace", "pattern": {"Regex": ends}, "content": ""}
    if spec.add_dummy_prefix:
        # Metaspace puts its mark before the text but where one stands there already; sentencepiece does so always.
        yield {"type": "Replace", "pattern": {"Regex": f"\\A[{marks}]"}, "content": SPACE * 2}


def _merges(proto: Any) -> list[list[str]]:
    """Return the pairs that join to a piece: by the pieces' scores, the best first, as sentencepiece joins them."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    ranked = sorted(scores, key=lambda name: -scores[name])  # stable: equal scores stay in the order of ids
    return [
        [piece[:cut], piece[cut:]]
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _probes(proto: Any) -> Iterator[str]:
    """Yield texts of all sorts, and what the vocabulary itself spells: every piece, and random rows of them."""
    pieces = [piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.type == piece.NORMAL]
    yield from _TEXTS
    yield "".join(_TEXTS)
    yield from pieces
    draw = random.Random(0)
    for _ in range(_PROBES if pieces else 0):
        row = draw.choices([*pieces, " ", "  ", "\n", "é", "\U0001f600"], k=draw.randrange(2, 12))
        yield draw.choice(("", " ")).join(row)
