"""Text to token ids and back: what a tokenizer is, the three kinds that are read, and training one.

In a document text is text: sentencepiece and tiktoken encode what looks like a control token letter by letter. A
Hugging Face tokenizer does as its file says, which commonly reads such strings as the tokens they name; its
`encode_plain` does not.
"""

import heapq
import io
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import numpy as np

from megalite.data.preprocessing.inputs import find_inputs
from megalite.data.preprocessing.readers import documents
from megalite.data.tokenizers import gpt2_files, tiktoken_tokenizer
from megalite.data.tokenizers.added_tokens import (
    ADDED_TOKENS,
    added_tokens_beside,
    added_tokens_file,
    with_added_tokens,
)
from megalite.data.tokenizers.control_tokens import END_OF_DOCUMENT
from megalite.data.tokenizers.hugging_face_tokenizer import HuggingFaceTokenizer
from megalite.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megalite.data.tokenizers.tiktoken_tokenizer import TiktokenTokenizer
from megalite.errors import UserError
from megalite.files import write_whole

_FORMS = {".json": "a Hugging Face tokenizer.json", tiktoken_tokenizer.SUFFIX: "a file of tiktoken's ranks"}
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
    def bos_id(self) -> int | None:
        """The token that begins a text, if the vocabulary has one."""
        ...

    @property
    def leading_id(self) -> int | None:
        """The token that the tokenizer's file puts before every text by itself; `encode` never does."""
        ...

    @property
    def unknown_id(self) -> int | None:
        """The token that stands for what the vocabulary cannot spell, if it has one."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What should be known of the tokenizer's file."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's file, in hexadecimal."""
        ...

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """The ids of the tokens that stand for no text, by name."""
        ...

    def token_id(self, name: str) -> int | None:
        """Return the id of a piece or control token by its exact name, or None where the vocabulary has none such."""
        ...

    def token_name(self, token: int) -> str | None:
        """Return the name of a piece or control token by its id, or None where the vocabulary has none such."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with no token added before or after."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text in which names of control tokens stay text, whatever `encode` does."""
        ...

    def message_encoder(self, names: Iterable[str]) -> Callable[[str], list[int]]:
        """Return an encoder of messages, which are text by strangers.

        No special token, no end of a document and none of `names` comes of them. The other tokens that a vocabulary
        adds to its pieces, such as ``<think>``, are read, as transformers reads them.
        """
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
    """Load a sentencepiece model, a Hugging Face ``tokenizer.json``, GPT-2's ``vocab.json`` with its ``merges.txt``,
    tiktoken's ranks, or a folder with one of them.

    Beside a ``tokenizer.model`` the tokens of ``added_tokens.json`` and ``tokenizer_config.json`` are read as well.

    Raises UserError where there is none or the file is broken.
    """
    file = tokenizer_file(path)
    try:
        if file.name in gpt2_files.NAMES:
            return HuggingFaceTokenizer(gpt2_files.as_tokenizer_json(file))
        data = file.read_bytes()
        if file.suffix == ".json":
            return HuggingFaceTokenizer(data)
        if file.suffix == tiktoken_tokenizer.SUFFIX:
            return TiktokenTokenizer(data, file.stem)
        return with_added_tokens(SentencePieceTokenizer(data), file)
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception and RuntimeError
        form = _FORMS.get(file.suffix, "a sentencepiece model")
        if file.name in gpt2_files.NAMES:
            form = "GPT-2's vocabulary"
        reason = str(error).replace("\n", " ")
        raise UserError(
            f"{file}: not {form} ({reason}); allowed: tokenizer.json, a sentencepiece .model, vocab.json with "
            "merges.txt, a .tiktoken"
        ) from error


def standard_name(file: Path) -> str:
    """Return the name under which a folder's tokenizer is looked for, of a tokenizer's file of any name."""
    if file.suffix == tiktoken_tokenizer.SUFFIX:  # whose name says which encoding it is
        return file.name
    return "tokenizer.json" if file.suffix == ".json" else "tokenizer.model"


def tokenizer_file(path: Path) -> Path:
    """Return the file of a tokenizer that is named by its file or its folder; raise UserError where there is none."""
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        if all((path / name).is_file() for name in gpt2_files.NAMES):
            return path / gpt2_files.NAMES[0]
        if ranks := sorted(path.glob(f"*{tiktoken_tokenizer.SUFFIX}")):
            return ranks[0]
        raise UserError(
            f"{path}: holds no tokenizer; a tokenizer.json, a tokenizer.model, a vocab.json with its merges.txt or an "
            "encoding's .tiktoken is looked for"
        )
    if not path.is_file():
        raise UserError(f"{path}: {_no_tokenizer(path)}")
    return path


def tokenizer_paths(path: Path) -> dict[str, Path]:
    """Return a tokenizer's files, by the names under which a folder's tokenizer is looked for; raise UserError where
    there is none."""
    file = tokenizer_file(path)
    if file.name in gpt2_files.NAMES:
        return {name: file.with_name(name) for name in gpt2_files.NAMES}
    added = file.with_name(ADDED_TOKENS)
    beside = {ADDED_TOKENS: added} if added_tokens_beside(file) and added.is_file() else {}
    return {standard_name(file): file} | beside


def standard_files(path: Path) -> dict[str, bytes]:
    """Return, by the names under which they are looked for, the files that make a tokenizer of this digest anywhere.

    GPT-2's two files come as one ``tokenizer.json``; a ``tokenizer.model`` comes with its added tokens. Raises
    UserError as `load_tokenizer` does.
    """
    file = tokenizer_file(path)
    if file.name in gpt2_files.NAMES:
        return {"tokenizer.json": gpt2_files.as_tokenizer_json(file)}
    name = standard_name(file)
    files = {name: file.read_bytes()}
    if name == "tokenizer.model" and (added := added_tokens_beside(file)):
        files[ADDED_TOKENS] = added_tokens_file(added)
    return files


def _no_tokenizer(path: Path) -> str:
    """Return what to say of a tokenizer that is not there."""
    forms = "a tokenizer.json, a sentencepiece .model, a vocab.json with its merges.txt, a .tiktoken"
    if path.suffix == ".model":
        return f"no such tokenizer; make one with `megalite tokenizer train INPUT --output {path}`, or give another"
    if path.suffix in (".json", ".txt", tiktoken_tokenizer.SUFFIX):
        return f"no such tokenizer; give another, which may be {forms}, or a folder with one of them"
    return (
        f"no such tokenizer, neither a file nor a folder; nothing is fetched by its name: give {forms}, or a folder "
        f"with one of them; or make one with `megalite tokenizer train INPUT --output {path.name or 'tok'}.model`"
    )


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
    control_tokens: Sequence[str] = (),
    overwrite: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> TrainingReport:
    """Train a BPE model (arXiv:1808.06226) that gives every text back as it was, and write it to `output`.

    Spaces and line ends are kept, digits stand alone, and what no piece spells falls back to bytes. The ids are
    0 ``<unk>``, 1 ``<s>``, 2 ``<|endoftext|>`` (end of document and of sequence), 3 to 258 the bytes, then the
    pieces, the layout that Llama's readers expect; `control_tokens`, which no text ever becomes, stand before the
    bytes. The same inputs give the same bytes. Beyond `sample_bytes` of text a sample of the documents is used, drawn
    by `seed`.

    Raises UserError for input that is malformed or too small for the vocabulary, for a control token that stands
    twice, for an output that is an input and, unless `overwrite`, for one that is there.
    """
    if output.is_dir():
        raise UserError(f"--output={output}: is a folder; write a name in it, such as {output / 'tok.model'}")
    if output.exists():
        if any(source.samefile(output) for source in find_inputs(inputs)):
            raise UserError(f"{output}: is an input; give another --output")
        if not overwrite:
            raise UserError(f"{output}: is there already; give another --output, or overwrite it with --force")
    taken = ["<unk>", "<s>", END_OF_DOCUMENT]
    for name in control_tokens:
        if not name or name in taken:
            raise UserError(f"--control-token={name}: {'stands twice' if name else 'is empty'}; give other names")
        taken.append(name)
    counted = _Counted(documents(inputs, [text_key], progress))
    texts = _sample(counted, sample_bytes, seed)
    if not any(texts):
        raise UserError(
            f"{', '.join(map(str, inputs))}: no text to train a tokenizer on; give documents that hold text"
        )
    started = time.perf_counter()
    model = _train(texts, vocab_size, control_tokens)
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


def _train(texts: list[str], vocab_size: int, control_tokens: Sequence[str]) -> bytes:
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
            control_symbols=list(control_tokens),
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
