"""Documents to token ids: one command over all cores, the same bytes for any number of workers.

The files are cut into chunks (`inputs`), worker processes turn chunks into token ids, and this process writes them
in the order of the input. Only a few chunks are under way at any time, so memory does not grow with the corpus.
"""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from megalite.data.index_format import DatasetSidecar, dtype_for
from megalite.data.inputs import CHUNK_BYTES, Chunk, Malformed, chunks, disk_bytes, find_inputs, parse, read
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.data.writer import IndexedDatasetWriter
from megalite.errors import UserError, nearest

ON_ERROR = ("fail", "skip")
_SHOWN_PROBLEMS = 10
_CHUNKS_PER_WORKER = 4


@dataclass(frozen=True, slots=True)
class PreprocessReport:
    """What was written, and how fast."""

    documents: int
    tokens: int
    vocab_size: int
    text_bytes: int
    """Of the input as it was parsed, after decompression."""
    seconds: float
    workers: int
    entropy: float
    """Of the unigram distribution of the tokens, in nats a token."""
    empty: int
    """Documents without a token, which are left out."""
    skipped: int
    """Malformed lines left out, under ``on_error="skip"``."""
    problems: tuple[str, ...]
    """The first of them, as ``file:line: reason``."""


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """The documents of one chunk as token ids, in a row."""

    chunk: Chunk
    tokens: np.ndarray
    lengths: np.ndarray
    empty: int
    malformed: tuple[Malformed, ...]
    text_bytes: int
    lines: int


Encoder = Callable[[Iterable[Chunk]], Iterator[EncodedChunk]]


def preprocess(
    inputs: Sequence[Path],
    tokenizer: Path,
    output_prefix: Path,
    *,
    text_key: str = "text",
    append_eod: bool = False,
    workers: int | None = None,
    on_error: str = "fail",
    progress: Callable[[int, int], None] | None = None,
) -> PreprocessReport:
    """Tokenize files and folders into ``output_prefix``.bin, .idx and .json.

    `workers` is the number of processes, by default one a core as far as the input keeps them busy; with 1 the work
    is done in this process. `progress` is told the bytes read so far and the bytes there are.

    Raises UserError for input that cannot be read or, under ``on_error="fail"``, for the first malformed line.
    """
    files = find_inputs(inputs)
    total = disk_bytes(files)
    loaded = _load(tokenizer, append_eod)
    workers = _usable_workers(workers, total)
    if on_error not in ON_ERROR:
        raise UserError(f"--on-error={on_error}{nearest(on_error, ON_ERROR)}")
    eod = loaded.eod_id if append_eod else None
    encode_one = partial(encode_chunk, text_key=text_key, eod=eod, dtype=dtype_for(loaded.vocab_size))
    started = time.perf_counter()
    with (
        IndexedDatasetWriter(output_prefix, dtype_for(loaded.vocab_size)) as writer,
        _encoder(encode_one, loaded, tokenizer, workers) as encode,
    ):
        tally = _Tally(loaded.vocab_size, keep_going=on_error == "skip")
        done = 0
        for encoded in encode(chunk for file in files for chunk in chunks(file)):
            tally.add(encoded)
            writer.add_documents(encoded.tokens, encoded.lengths)
            done += encoded.chunk.disk_bytes
            if progress:
                progress(done, total)
        if not writer.num_documents:
            raise UserError(f"{', '.join(map(str, inputs))}: not one document with text under {text_key!r}; give some")
        writer.finalize(tally.sidecar(writer, loaded))
    return tally.report(writer, workers, time.perf_counter() - started)


def encode_chunk(
    chunk: Chunk, tokenizer: Tokenizer, *, text_key: str, eod: int | None, dtype: np.dtype
) -> EncodedChunk:
    """Read, parse and encode one chunk; each document that has tokens ends with `eod` unless that is None."""
    data = read(chunk)
    texts: list[str] = []
    malformed: list[Malformed] = []
    for document in parse(chunk, data, text_key):
        if isinstance(document, Malformed):
            malformed.append(document)
        else:
            texts.append(document)
    encoded = [ids for ids in tokenizer.encode_arrays(texts) if len(ids)]
    empty = len(texts) - len(encoded)
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int32)
    if eod is not None:
        mark = np.array([eod], dtype=np.int32)
        encoded = [part for ids in encoded for part in (ids, mark)]
        lengths += 1
    tokens = np.concatenate(encoded).astype(dtype) if encoded else np.empty(0, dtype=dtype)
    return EncodedChunk(chunk, tokens, lengths, empty, tuple(malformed), len(data), data.count(b"\n"))


class _Tally:
    """Counts what goes by, in the order of the input."""

    def __init__(self, vocab_size: int, *, keep_going: bool) -> None:
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._keep_going = keep_going
        self._lines = 0
        self._text_bytes = 0
        self._empty = 0
        self._skipped = 0
        self._problems: list[str] = []

    def add(self, encoded: EncodedChunk) -> None:
        if encoded.chunk.start == 0:
            self._lines = 0
        for malformed in encoded.malformed:
            problem = f"{encoded.chunk.path}:{self._lines + malformed.line}: {malformed.reason}"
            if not self._keep_going:
                raise UserError(f"{problem}; mend it, or leave such lines out with --on-error skip")
            self._skipped += 1
            if len(self._problems) < _SHOWN_PROBLEMS:
                self._problems.append(problem)
        self._lines += encoded.lines
        self._text_bytes += encoded.text_bytes
        self._empty += encoded.empty
        self._counts += np.bincount(encoded.tokens, minlength=len(self._counts))

    def entropy(self) -> float:
        counts = self._counts[self._counts > 0]
        shares = counts / counts.sum()
        # math.fsum: the last digit must not hang on numpy's order of summation.
        return math.fsum(-shares * np.log(shares))

    def sidecar(self, writer: IndexedDatasetWriter, tokenizer: Tokenizer) -> DatasetSidecar:
        return DatasetSidecar(
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.digest,
            num_tokens=writer.num_tokens,
            num_documents=writer.num_documents,
            max_token_id=int(self._counts.nonzero()[0][-1]),
            token_counts_entropy=self.entropy(),
        )

    def report(self, writer: IndexedDatasetWriter, workers: int, seconds: float) -> PreprocessReport:
        return PreprocessReport(
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            vocab_size=len(self._counts),
            text_bytes=self._text_bytes,
            seconds=seconds,
            workers=workers,
            entropy=self.entropy(),
            empty=self._empty,
            skipped=self._skipped,
            problems=tuple(self._problems),
        )


def _load(path: Path, append_eod: bool) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if append_eod and tokenizer.eod_id is None:
        raise UserError(f"{path}: has no end-of-document token for --append-eod; leave it away, or add <|endoftext|>")
    return tokenizer


def _usable_workers(wanted: int | None, total_bytes: int) -> int:
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # A process takes about as long to start as a core takes to encode a few chunks.
        return max(1, min(cores, total_bytes // (4 * CHUNK_BYTES)))
    if wanted < 1:
        raise UserError(f"--workers={wanted}: allowed are 1 and more; leave it away for one a core")
    return wanted


@contextmanager
def _encoder(encode_one: Callable[..., EncodedChunk], loaded: Tokenizer, path: Path, workers: int) -> Iterator[Encoder]:
    if workers == 1:
        yield lambda work: (encode_one(chunk, loaded) for chunk in work)
        return
    # Spawned, not forked: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield partial(_encode_in_order, pool, partial(_encode_in_worker, encode_one, path, loaded.digest), workers)
    except BrokenProcessPool as error:
        raise UserError(
            f"preprocess: a worker process was killed, most likely for want of memory; use fewer than --workers "
            f"{workers}, or shorter documents"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_in_order(
    pool: Executor, encode: Callable[[Chunk], EncodedChunk], workers: int, work: Iterable[Chunk]
) -> Iterator[EncodedChunk]:
    under_way: deque[Future[EncodedChunk]] = deque()
    for chunk in work:
        under_way.append(pool.submit(encode, chunk))
        if len(under_way) == _CHUNKS_PER_WORKER * workers:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _encode_in_worker(encode_one: Callable[..., EncodedChunk], path: Path, digest: str, chunk: Chunk) -> EncodedChunk:
    return encode_one(chunk, _tokenizer_of_worker(path, digest))


@cache
def _tokenizer_of_worker(path: Path, digest: str) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if tokenizer.digest != digest:
        raise UserError(f"{path}: changed while it was in use; leave the tokenizer alone until preprocess is done")
    return tokenizer


def _start_worker() -> None:
    # Control-C reaches every process of the terminal; the parent alone says how it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process a core already: threads inside would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent says no goodbye, and its workers would wait for the next chunk for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
