"""Text to token ids and back: sentencepiece models, Hugging Face ``tokenizer.json``, and training of the former.

Text is text: what looks like a control token in a document is encoded letter by letter by sentencepiece. A Hugging
Face tokenizer does as its file says, which commonly reads such strings as the tokens they name.
"""

import hashlib
import heapq
import io
import random
import re
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from megalite.data.inputs import documents
from megalite.errors import UserError
from megalite.files import write_whole

END_OF_DOCUMENT = "<|endoftext|>"
_END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
_SAMPLE_BYTES = 100_000_000


class Tokenizer(Protocol):
    """What the rest of megalite knows of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def eod_id(self) -> int | None:
        """The token that ends a document, if the vocabulary has one."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's file, in hexadecimal."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with no token added before or after."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        ...

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text as int32[tokens], the fast way for a corpus."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a sentencepiece model, a Hugging Face ``tokenizer.json``, or a folder that holds one of the two.

    Raises UserError where there is none or the file is broken.
    """
    file = _tokenizer_file(path)
    data = file.read_bytes()
    kind = HuggingFaceTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    try:
        return kind(data)
    except Exception as error:  # the libraries raise bare Exception and RuntimeError
        form = "a Hugging Face tokenizer.json" if file.suffix == ".json" else "a sentencepiece model"
        reason = str(error).replace("\n", " ")
        raise UserError(f"{file}: not {form} ({reason}); allowed: tokenizer.json, or a sentencepiece .model") from error


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: holds no tokenizer; a tokenizer.json or a tokenizer.model is looked for")
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer; make one with `megalite tokenizer train INPUT --output {path}`")
    return path


class HuggingFaceTokenizer:
    """A ``tokenizer.json``, through the `tokenizers` library."""

    def __init__(self, data: bytes) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        # A file may ask for both, which would cut or fill documents in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so the number of entries does not bound them.
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = next((vocabulary[name] for name in _END_OF_DOCUMENT_NAMES if name in vocabulary), None)
        self.digest = hashlib.sha256(data).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with no token added before or after."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text as int32[tokens]."""
        return [np.array(ids, dtype=np.int32) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; control tokens have none."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


class SentencePieceTokenizer:
    """A sentencepiece model; encodes word by word from a cache where that is exact, which is several times faster."""

    def __init__(self, data: bytes) -> None:
        import sentencepiece

        if not data:
            raise ValueError("the file is empty")
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        self._words = _WordCache.of(data)
        self.vocab_size: int = self._processor.vocab_size()
        self.eod_id = self._end_of_document()
        self.digest = hashlib.sha256(data).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with no token added before or after."""
        return self._encode_array(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text as int32[tokens]."""
        return [self._encode_array(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; control tokens have none."""
        return self._processor.decode(list(ids))

    def _encode_array(self, text: str) -> np.ndarray:
        if self._words is None:
            return np.array(self._processor.encode(text), dtype=np.int32)
        return np.frombuffer(self._words.encode(text), dtype=np.int32)

    def _end_of_document(self) -> int | None:
        for name in _END_OF_DOCUMENT_NAMES:
            token = self._processor.piece_to_id(name)
            if self._processor.id_to_piece(token) == name:
                return token
        declared = self._processor.eos_id()
        return declared if declared >= 0 else None


class _WordCache(dict[str, bytes]):
    """The ids of each word, as int32 bytes; a word is letters, one digit or other signs, with the spaces before them.

    BPE joins neighbours only into pieces of the vocabulary, so where every piece lies within one word, the ids of a
    text are those of its words in a row. sentencepiece reads U+2581 as a space.
    """

    _WORD = re.compile("[ \u2581]*(?:[^\\W\\d_]+|\\d|(?:[^\\w \u2581]|_)+)|[ \u2581]+")
    _MAX_WORDS = 1 << 18
    _MAX_LETTERS = 32

    def __init__(self, encode: Callable[[str], list[int]], prefix: str) -> None:
        super().__init__()
        self._encode = encode
        self._prefix = prefix

    @classmethod
    def of(cls, model: bytes) -> Self | None:
        """Return the cache for a model, or None where words in a row are not exact."""
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] (made when imported)
        proto.ParseFromString(model)
        trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
        matched = {proto.SentencePiece.NORMAL, proto.SentencePiece.USER_DEFINED, proto.SentencePiece.UNUSED}
        exact = (
            trainer.model_type == trainer.BPE
            and not trainer.treat_whitespace_as_suffix
            and not normalizer.precompiled_charsmap
            and not normalizer.remove_extra_whitespaces
            and normalizer.escape_whitespaces
            and all(cls._WORD.fullmatch(piece.piece) for piece in proto.pieces if piece.type in matched)
        )
        if not exact:
            return None
        prefix = " " if normalizer.add_dummy_prefix else ""
        normalizer.add_dummy_prefix = False
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        return cls(processor.encode, prefix)

    def encode(self, text: str) -> bytes:
        """Return the ids of a text."""
        return b"".join(map(self.__getitem__, self._WORD.findall(self._prefix + text))) if text else b""

    def __missing__(self, word: str) -> bytes:
        ids = array("i", self._encode(word)).tobytes()
        if len(word) <= self._MAX_LETTERS and len(self) < self._MAX_WORDS:
            self[word] = ids
        return ids


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a tokenizer was trained on."""

    documents: int
    documents_used: int
    text_bytes_used: int
    seconds: float
    """Of the training alone, without the reading."""


def train_sentencepiece(
    inputs: Sequence[Path],
    *,
    vocab_size: int,
    output: Path,
    text_key: str = "text",
    seed: int = 1234,
    sample_bytes: int = _SAMPLE_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> TrainingReport:
    """Train a BPE model (arXiv:1808.06226) that gives every text back as it was, and write it to `output`.

    Spaces and line ends are kept, digits stand alone, and what no piece spells falls back to bytes. The ids are
    0 ``<unk>``, 1 ``<s>``, 2 ``<|endoftext|>`` (end of document and of sequence), 3 to 258 the bytes, then the
    pieces, the layout that Llama's readers expect. The same inputs give the same bytes. Beyond `sample_bytes` of
    text a sample of the documents is used, drawn by `seed`.

    Raises UserError for input that is malformed or too small for the vocabulary.
    """
    counted = _Counted(documents(inputs, text_key, progress))
    texts = _sample(counted, sample_bytes, seed)
    if not any(texts):
        raise UserError(
            f"{', '.join(map(str, inputs))}: no text to train a tokenizer on; give documents that hold text"
        )
    started = time.perf_counter()
    model = _train(texts, vocab_size)
    seconds = time.perf_counter() - started
    write_whole(output, model)
    return TrainingReport(counted.count, len(texts), sum(len(text.encode()) for text in texts), seconds)


class _Counted:
    def __init__(self, items: Iterable[str]) -> None:
        self.count = 0
        self._items = items

    def __iter__(self):
        for item in self._items:
            self.count += 1
            yield item


def _sample(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """Keep all texts, or those with the lowest lots that fit into `limit` characters, in one pass."""
    lots = random.Random(seed)
    kept: list[tuple[float, int, str]] = []
    size = 0
    for position, text in enumerate(texts):
        heapq.heappush(kept, (-lots.random(), position, text))
        size += len(text)
        while size > limit and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2])
    return [text for _, _, text in sorted(kept, key=itemgetter(1))]


def _train(texts: list[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            eos_piece=END_OF_DOCUMENT,
            pad_id=-1,
            # It is recorded in the model: another number would give other bytes.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _vocabulary_error(vocab_size, str(error)) from error
    return model.getvalue()


def _vocabulary_error(vocab_size: int, reason: str) -> UserError:
    if most := re.search(r"set it to a value <= (\d+)", reason):
        return UserError(f"--vocab-size={vocab_size}: the text yields {most[1]} pieces; use {most[1]}, or more text")
    if least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        return UserError(f"--vocab-size={vocab_size}: bytes and characters alone need {least[1]}; use more than that")
    return UserError(f"--vocab-size={vocab_size}: sentencepiece refuses: {reason}")
