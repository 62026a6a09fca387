"""One shard of text to token ids on the disk; what every worker process of `preprocess` does."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
import orjson

from megalite.data.preprocess.inputs import Segment
from megalite.data.preprocess.long_text import LongText
from megalite.data.preprocess.readers import Batch, Extract, read
from megalite.data.preprocess.source_location import Malformed, Place
from megalite.data.tokenizers.base import Tokenizer
from megalite.data.tokenizers.control_tokens import TextRefused
from megalite.files import write_atomically

if TYPE_CHECKING:
    from megalite.data.chat.chat_template import ChatTemplate

HASH_BYTES = 16
SHOWN_PROBLEMS = 10
_EMPTY = "an empty document"
_NO_TOKEN = "an empty document to the tokenizer, which makes no token of its text"
_MOST_TOKENS = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides, beside the text and the tokenizer, which tokens are written."""

    extract: Extract
    dtype: str
    eod: int | None = None
    """The token put behind every document."""
    bos: int | None = None
    """The token put before every document."""
    min_tokens: int = 1
    """Documents of fewer tokens, beginning and end of document not counted, are left out."""
    hashed: bool = False
    """A hash of every document is written beside its tokens."""
    keep_going: bool = False
    """Malformed documents are counted; otherwise the first one ends the shard."""
    ignore: tuple[str, ...] = ()
    """Keys of conversations that are passed over."""


@dataclass(frozen=True, slots=True)
class Coder:
    """What texts are encoded with."""

    tokenizer: Tokenizer
    template: "ChatTemplate | None" = None


@dataclass(slots=True)
class ShardReport:
    """What became of the documents of a shard."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    short: int = 0
    malformed: int = 0
    problems: list[tuple[int, int, int | None, str]] = field(default_factory=list)
    """The first malformed or empty ones: segment of the shard, line or row in it, byte, reason."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Keys of conversations that were passed over, and in how many conversations."""
    records: list[int] = field(default_factory=list)
    """How many documents each segment of the shard had, malformed and empty ones with them."""


class MalformedDocument(Exception):
    """A document that cannot be encoded, where that is no thing to go on from."""

    def __init__(self, segment: int, malformed: Malformed) -> None:
        super().__init__(segment, malformed)
        self.segment = segment
        self.malformed = malformed


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """Where the tokens of a shard lie while the others are made; the report is written last."""

    stem: Path

    @property
    def tokens(self) -> Path:
        """Token ids in a row."""
        return self.stem.with_suffix(".bin")

    @property
    def lengths(self) -> Path:
        """int32, one a document."""
        return self.stem.with_suffix(".lengths")

    @property
    def loss_mask(self) -> Path:
        """uint8, one a token."""
        return self.stem.with_suffix(".mask")

    @property
    def hashes(self) -> Path:
        """`HASH_BYTES` a document."""
        return self.stem.with_suffix(".hashes")

    @property
    def counts(self) -> Path:
        """int64: the token ids that occur, then how often each does."""
        return self.stem.with_suffix(".counts")

    @property
    def report(self) -> Path:
        """What the shard was made from, and a `ShardReport`."""
        return self.stem.with_suffix(".json")


def encode_shard(
    shard: tuple[Segment, ...],
    recipe: Recipe,
    coder: Coder,
    files: ShardFiles,
    source: str,
    tell: Callable[[float, int], None],
) -> ShardReport:
    """Encode a shard into `files`; `tell` is called with the bytes read and the tokens made since the last call.

    Raises UserError for what cannot be read, MalformedDocument where the recipe does not keep going.
    """
    with _ShardWriter(files, recipe, coder) as writer:
        for number, segment in enumerate(shard):
            writer.report.records.append(0)
            for batch in read(segment, recipe.extract):
                writer.report.records[number] += len(batch.documents) + len(batch.malformed)
                before = writer.report.tokens
                writer.add(number, batch)
                tell(batch.disk_bytes, writer.report.tokens - before)
    write_atomically(files.report, json.dumps({"source": source, **asdict(writer.report)}).encode())
    return writer.report


def finished_report(files: ShardFiles, source: str, recipe: Recipe) -> ShardReport | None:
    """Return the report of a shard that was made from `source` and is all there, or None."""
    try:
        content = json.loads(files.report.read_bytes())
        if content.pop("source") != source:
            return None
        report = ShardReport(**content)
        width = np.dtype(recipe.dtype).itemsize
        sizes = {files.tokens: width * report.tokens, files.lengths: 4 * report.documents}
        if recipe.hashed:
            sizes[files.hashes] = HASH_BYTES * report.documents
        if recipe.extract.structured:
            sizes[files.loss_mask] = report.tokens
        whole = all(path.stat().st_size == size for path, size in sizes.items()) and files.counts.exists()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return report if whole and (recipe.keep_going or not report.problems) else None


def encode_long(text: LongText, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the token ids of a text part by part, each as int32[tokens]."""
    try:
        line_end = tokenizer.encode("\n")
    except TextRefused:  # then no part that begins with one can be encoded either, and each is encoded bare
        line_end = None
    for number, part in enumerate(text.parts()):
        # Behind a line end no tokenizer adds the space that some put before a text.
        behind = number > 0 and line_end is not None
        (ids,) = tokenizer.encode_arrays([f"\n{part}" if behind else part])
        if behind and line_end is not None and ids[: len(line_end)].tolist() == line_end:
            ids = ids[len(line_end) :]
        elif behind:
            (ids,) = tokenizer.encode_arrays([part])
        yield ids


def hash_of(document: object) -> bytes:
    """Return `HASH_BYTES` that two documents share only where they are equal."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    if isinstance(document, LongText):
        for block in document.blocks():
            digest.update(block.encode())
    else:
        digest.update(document.encode() if isinstance(document, str) else orjson.dumps(document))
    return digest.digest()


class _ShardWriter:
    def __init__(self, files: ShardFiles, recipe: Recipe, coder: Coder) -> None:
        self.report = ShardReport()
        self._recipe = recipe
        self._coder = coder
        self._dtype = np.dtype(recipe.dtype)
        self._files = files
        self._counts = np.zeros(coder.tokenizer.vocab_size, dtype=np.int64)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        create = lambda path: self._open.enter_context(path.open("wb"))  # noqa: E731
        self._tokens: BinaryIO = create(self._files.tokens)
        self._lengths: BinaryIO = create(self._files.lengths)
        self._hashes: BinaryIO | None = create(self._files.hashes) if self._recipe.hashed else None
        self._mask: BinaryIO | None = create(self._files.loss_mask) if self._coder.template else None
        self._counts_file: BinaryIO = create(self._files.counts)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._open:
            if error is None:
                seen = np.flatnonzero(self._counts)
                self._counts_file.write(np.stack([seen, self._counts[seen]]).astype("<i8").tobytes())
                for file in (self._tokens, self._lengths, self._hashes, self._mask, self._counts_file):
                    if file is not None:
                        file.flush()
                        os.fsync(file.fileno())

    def add(self, segment: int, batch: Batch) -> None:
        """Encode and append the documents of a batch."""
        self.report.text_bytes += batch.text_bytes
        documents, places = batch.documents, batch.places
        if batch.malformed or "" in documents:
            kept = [index for index, document in enumerate(documents) if document != ""]
            empty = [Malformed(places[index], _EMPTY) for index in set(range(len(documents))).difference(kept)]
            for malformed in sorted([*batch.malformed, *empty], key=lambda malformed: malformed.place.number):
                self._leave_out(segment, malformed)
            documents, places = [documents[index] for index in kept], [places[index] for index in kept]
        if self._coder.template is not None:
            self._add_conversations(segment, documents, places, self._coder.template)
        elif any(isinstance(document, LongText) for document in documents):
            for document, place in zip(documents, places, strict=True):
                if isinstance(document, LongText):
                    self._add_long(segment, document, place)
                else:
                    self._add_texts(segment, [document], [place])
        elif documents:
            self._add_texts(segment, documents, places)

    def _add_texts(self, segment: int, documents: Sequence[str], places: Sequence[Place]) -> None:
        try:
            self._append(segment, documents, places, self._coder.tokenizer.encode_arrays(documents))
        except TextRefused as error:
            if len(documents) == 1:
                self._leave_out(segment, Malformed(places[0], str(error)))
            else:  # one of them; the others have tokens
                for document, place in zip(documents, places, strict=True):
                    self._add_texts(segment, [document], [place])

    def _add_conversations(
        self, segment: int, documents: Sequence[Any], places: Sequence[Place], template: "ChatTemplate"
    ) -> None:
        from megalite.data.chat.conversations import read_conversation

        encoded = []
        for record, place in zip(documents, places, strict=True):
            try:
                conversation = read_conversation(record, self._recipe.ignore)
                ids, mask = template.encode_conversation(conversation, self._coder.tokenizer)
                # Two records are equal documents where the same is written of both.
                encoded.append(([ids.tolist(), mask.tolist()] if self._hashes else None, place, ids, mask))
                for key in conversation.ignored:
                    self.report.ignored[key] = self.report.ignored.get(key, 0) + 1
            except (ValueError, TextRefused) as error:
                self._leave_out(segment, Malformed(place, str(error)))
        if encoded:
            self._append(segment, *zip(*encoded, strict=True))

    def _append(
        self,
        segment: int,
        documents: Sequence[Any],
        places: Sequence[Place],
        encoded: Sequence[np.ndarray],
        masks: Sequence[np.ndarray] | None = None,
    ) -> None:
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        keep = lengths >= self._recipe.min_tokens
        if not keep.all():
            for index in np.flatnonzero(lengths == 0).tolist():
                self._leave_out(segment, Malformed(places[index], _NO_TOKEN))
            self.report.short += int(np.count_nonzero(~keep & (lengths > 0)))
            documents, encoded = list(compress(documents, keep)), list(compress(encoded, keep))
            masks = list(compress(masks, keep)) if masks is not None else None
            lengths = lengths[keep]
        if not encoded:
            return
        tokens = np.concatenate(encoded)
        mask = np.concatenate(masks) if masks is not None else None
        for token, behind in ((self._recipe.bos, False), (self._recipe.eod, True)):
            if token is not None:
                edges = np.cumsum(lengths) - (0 if behind else lengths)
                tokens = np.insert(tokens, edges, token)
                mask = np.insert(mask, edges, 0) if mask is not None else None
                lengths = lengths + 1
        self._counts += np.bincount(tokens, minlength=len(self._counts))
        self._tokens.write(tokens.astype(self._dtype).data)
        if self._mask is not None and mask is not None:
            self._mask.write(mask.astype(np.uint8).data)
        self._close_documents(lengths, documents)

    def _add_long(self, segment: int, text: LongText, place: Place) -> None:
        start, length, counts = self._tokens.tell(), 0, np.zeros_like(self._counts)
        self._write_edge(self._recipe.bos, counts)
        try:
            for ids in encode_long(text, self._coder.tokenizer):
                counts += np.bincount(ids, minlength=len(counts))
                self._tokens.write(ids.astype(self._dtype).data)
                length += len(ids)
        except TextRefused as error:
            self._tokens.seek(start)
            self._tokens.truncate()
            self._leave_out(segment, Malformed(place, str(error)))
            return
        if self._recipe.min_tokens <= length < _MOST_TOKENS:
            self._write_edge(self._recipe.eod, counts)
            length += sum(token is not None for token in (self._recipe.bos, self._recipe.eod))
            self._counts += counts
            self._close_documents(np.array([length]), [text])
            return
        self._tokens.seek(start)
        self._tokens.truncate()
        if not length:
            self._leave_out(segment, Malformed(place, _NO_TOKEN))
        elif length < _MOST_TOKENS:
            self.report.short += 1
        else:
            reason = f"a document of {length:,} tokens; an index holds up to {_MOST_TOKENS - 1:,}; cut it"
            self._leave_out(segment, Malformed(place, reason))

    def _write_edge(self, token: int | None, counts: np.ndarray) -> None:
        if token is not None:
            self._tokens.write(np.array([token], self._dtype).data)
            counts[token] += 1

    def _close_documents(self, lengths: np.ndarray, documents: Sequence[Any]) -> None:
        self._lengths.write(lengths.astype("<i4").data)
        if self._hashes is not None:
            self._hashes.write(b"".join(map(hash_of, documents)))
        self.report.documents += len(lengths)
        self.report.tokens += int(lengths.sum())

    def _leave_out(self, segment: int, malformed: Malformed) -> None:
        if not self._recipe.keep_going:
            raise MalformedDocument(segment, malformed)
        if malformed.reason in (_EMPTY, _NO_TOKEN):
            self.report.empty += 1
        else:
            self.report.malformed += 1
        if len(self.report.problems) < SHOWN_PROBLEMS:
            place = malformed.place
            self.report.problems.append((segment, place.number, place.byte, malformed.reason))
