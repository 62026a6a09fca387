"""Train a sentencepiece tokenizer on a sample of documents."""

import heapq
import io
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from megalite.data.preprocess.inputs import find_inputs
from megalite.data.preprocess.readers import documents
from megalite.data.tokenizers.control_tokens import END_OF_DOCUMENT
from megalite.errors import UserError
from megalite.files import write_atomically

_SAMPLE_BYTES = 100_000_000


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
    write_atomically(output, model)
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
