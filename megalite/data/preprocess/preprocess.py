"""Documents to token ids: one command over all cores, the same bytes for any number of workers.

The input is cut into shards (`inputs`), each of which some process encodes into files of its own (`encode_shard`,
`workers`) in a folder beside the output (`work_folder`); what is finished there outlives an interruption. Then the
shards are put together (`merge_shards`). Only a few megabytes of text are under way at any time, so memory does not
grow with the corpus. While it runs, the tokens stand on the disk twice.
"""

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalite.data.indexed.format import DatasetSidecar, dtype_for, with_suffix
from megalite.data.indexed.writer import SUFFIXES, IndexedDatasetWriter, require_new_dataset, require_prefix
from megalite.data.preprocess.deduplicate import find_duplicates
from megalite.data.preprocess.encode_shard import (
    SHOWN_PROBLEMS,
    Coder,
    MalformedDocument,
    Recipe,
    ShardFiles,
    ShardReport,
    finished_report,
)
from megalite.data.preprocess.inputs import Segment, disk_bytes, find_inputs, shards
from megalite.data.preprocess.merge_shards import count_tokens, runs, write_in_order, write_shuffled
from megalite.data.preprocess.readers import Extract
from megalite.data.preprocess.source_location import Locator, Malformed, Place
from megalite.data.preprocess.work_folder import WorkFolder, work_folder
from megalite.data.preprocess.workers import (
    CoderFiles,
    Interrupted,
    Task,
    chat_template,
    encode_here,
    encode_in_workers,
    interruptible,
)
from megalite.data.tokenizers.base import Tokenizer
from megalite.data.tokenizers.load import load_tokenizer
from megalite.data.tokenizers.tokenizer_config import TokenizerConfig
from megalite.errors import UserError, nearest

if TYPE_CHECKING:
    from megalite.data.chat.chat_template import ChatTemplate

ON_ERROR = ("fail", "skip")
_BYTES_FOR_A_WORKER = 1 << 22
_SHOWN_FILES = 3
# Shards of an earlier version are made anew where this is raised.
_SHARD_VERSION = 3

Progress = Callable[[int, int, int], None]
"""Is told the bytes read so far, the bytes there are, and the tokens made so far."""


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
    """Documents without a token, left out under ``on_error="skip"``."""
    skipped: int
    """Malformed documents left out under ``on_error="skip"``."""
    short: int
    """Documents shorter than `min_tokens`, left out."""
    duplicates: int
    """Documents equal to an earlier one, left out."""
    problems: tuple[str, ...]
    """The first empty or malformed ones, as ``file:line: byte n: reason``."""
    new_text_bytes: int
    """What of `text_bytes` was encoded by this run and not by an interrupted one before."""
    new_tokens: int
    """The tokens of that, documents included that were left out afterwards."""
    ignored: Mapping[str, int]
    """Keys of conversations that were passed over, and in how many conversations."""
    notes: tuple[str, ...]
    """What else should be known of the tokens."""


def preprocess(
    inputs: Sequence[Path],
    tokenizer: Path,
    output_prefix: Path,
    *,
    text_key: str | Sequence[str] | None = None,
    split_lines: bool = False,
    append_eod: bool = False,
    eod_token: str | None = None,
    prepend_bos: bool = False,
    bos_token: str | None = None,
    ignore_key: Sequence[str] = (),
    workers: int | None = None,
    on_error: str = "fail",
    min_tokens: int = 0,
    dedup: bool = False,
    document_shuffle: int | None = None,
    chat: str | None = None,
    overwrite: bool = True,
    progress: Progress | None = None,
) -> PreprocessReport:
    """Tokenize files and folders into ``output_prefix``.bin, .idx and .json, and .mask with a chat template.

    `text_key` is ``text`` by default, with `chat` the whole object; the texts under several keys are joined by a line
    end.
    `eod_token` is put behind every document, with `append_eod` alone the tokenizer's own mark; `bos_token` before it,
    with `prepend_bos` alone the tokenizer's own. Of conversations the keys in `ignore_key` are passed over. `workers`
    is the number of processes, by default one a core as far as the input keeps them busy; with 1 the work is done in
    this process.
    `document_shuffle` is the seed of the order in which documents are written. An interrupted run goes on where it was
    if it is called again with the same input.

    Raises UserError for input that cannot be read or, under ``on_error="fail"``, for the first malformed document; for
    an output that is an input and, unless `overwrite`, for one that is there; Interrupted after SIGINT or SIGTERM.
    """
    started = time.perf_counter()
    require_prefix(output_prefix)
    files = find_inputs(inputs)
    _require_free(output_prefix, files, overwrite)
    total = disk_bytes(files)
    loaded = load_tokenizer(tokenizer)
    workers = _usable_workers(workers, total)
    _require_options(on_error, min_tokens, document_shuffle)
    recipe = Recipe(
        Extract(_keys(text_key, chat), split_lines, structured=chat is not None),
        dtype_for(loaded.vocab_size).str,
        _edge(loaded, tokenizer, _END, append_eod, eod_token),
        _edge(loaded, tokenizer, _BEGINNING, prepend_bos, bos_token),
        max(min_tokens, 1),
        hashed=dedup,
        keep_going=on_error == "skip",
        ignore=tuple(sorted(set(ignore_key))),
    )
    if recipe.ignore and chat is None:
        raise UserError(f"--ignore-key={recipe.ignore[0]}: is for conversations; give --chat TEMPLATE, or leave it out")
    # Not resolved: behind a link a file may have a name that does not say what it is.
    coder_files = CoderFiles(tokenizer.absolute(), loaded.digest, chat)
    coder = Coder(loaded, chat_template(chat))
    if coder.template is not None:
        coder.template.require(loaded)
        _require_one_beginning(coder.template, loaded, recipe.bos)
    with interruptible() as check, work_folder(output_prefix) as work:
        made = _Shards(work, recipe, _origin(recipe, coder_files), total, progress, check)
        try:
            tasks = made.tasks(shards(files, split_lines=split_lines))
            if workers == 1:
                done = encode_here(tasks, recipe, coder, made.tell)
            else:
                done = encode_in_workers(tasks, recipe, coder, coder_files, workers, check, made.tell)
            # Closed also when something fails, so that no worker stays behind.
            with closing(done):
                made.collect(done)
            sidecar, counts = _write(made, files, loaded, output_prefix, document_shuffle, check)
        except UserError as error:
            if work.keep:
                raise UserError(f"{error}; {work.how_to_resume()}") from error
            raise
        except Interrupted as stop:
            stop.fix = work.how_to_resume()
            raise
        work.done = True
    notes = (
        *_notes_on_files(made.without_records(files)),
        *_notes_of(loaded, tokenizer),
        *_notes_on(loaded, tokenizer, recipe, counts),
    )
    return made.report(sidecar, workers, time.perf_counter() - started, notes)


class _Shards:
    """The shards of one run: what is to be done, what is done, and what came of it."""

    def __init__(
        self,
        work: WorkFolder,
        recipe: Recipe,
        origin: str,
        total_bytes: int,
        progress: Progress | None,
        check: Callable[[], None],
    ) -> None:
        self.work = work
        self.recipe = recipe
        self._origin = origin
        self._total_bytes = total_bytes
        self._progress = progress
        self._check = check
        self._read_bytes = 0.0
        self._tokens = 0
        self._reports: dict[int, ShardReport] = {}
        self._resumed: set[int] = set()
        self._failures: list[tuple[int, str]] = []
        self._problems: dict[int, list[str]] = {}
        self._locator = Locator()
        self._records: Counter[Path] = Counter()

    def tasks(self, planned: Iterable[tuple[Segment, ...]]) -> Iterator[Task]:
        """Yield what is still to be done, until something has failed."""
        for number, shard in enumerate(planned):
            if self._failures:
                return
            files, source = self.work.shard(number), self._source(shard)
            report = finished_report(files, source, self.recipe)
            if report is None:
                yield Task(number, shard, source, files)
            else:
                self._resumed.add(number)
                self._take(number, shard, report)
                self.tell(sum(segment.disk_bytes for segment in shard), report.tokens)

    def tell(self, read_bytes: float, tokens: int) -> None:
        """Take note of bytes read and tokens made."""
        self._check()
        self._read_bytes += read_bytes
        self._tokens += tokens
        if self._progress:
            self._progress(min(round(self._read_bytes), self._total_bytes), self._total_bytes, self._tokens)

    def collect(self, done: Iterable[tuple[Task, ShardReport | MalformedDocument]]) -> None:
        """Take what became of each shard; raise UserError for the first document that could not be encoded."""
        for task, outcome in done:
            if isinstance(outcome, ShardReport):
                self._take(task.number, task.shard, outcome)
            else:
                problem = self._locator.describe(task.shard[outcome.segment], outcome.malformed)
                self._failures.append((task.number, problem))
        if self._failures:
            _, problem = min(self._failures)
            raise UserError(f"{problem}; mend it, or leave such documents out with --on-error skip")

    def files(self) -> list[ShardFiles]:
        """Return the files of all shards, in order."""
        return [self.work.shard(number) for number in range(len(self._reports))]

    def sum_of(self, count: Callable[[ShardReport], int], *, resumed: bool = True) -> int:
        """Return a sum over the shards, with or without those that an earlier run has made."""
        return sum(count(report) for number, report in self._reports.items() if resumed or number not in self._resumed)

    def problems(self) -> tuple[str, ...]:
        """Return the first malformed or empty documents."""
        problems = [problem for number in sorted(self._problems) for problem in self._problems[number]]
        return tuple(problems[:SHOWN_PROBLEMS])

    def ignored(self) -> dict[str, int]:
        """Return the keys of conversations that were passed over, and in how many conversations."""
        return dict(sorted(sum((Counter(report.ignored) for report in self._reports.values()), Counter()).items()))

    def without_records(self, files: Iterable[Path]) -> list[Path]:
        """Return those of the files that hold no document, not even a malformed one."""
        return [path for path in files if not self._records[path]]

    def report(self, sidecar: DatasetSidecar, workers: int, seconds: float, notes: tuple[str, ...]) -> PreprocessReport:
        """Return what was written."""
        return PreprocessReport(
            documents=sidecar.num_documents,
            tokens=sidecar.num_tokens,
            vocab_size=sidecar.vocab_size,
            text_bytes=self.sum_of(lambda report: report.text_bytes),
            seconds=seconds,
            workers=workers,
            entropy=sidecar.token_counts_entropy,
            empty=sidecar.empty,
            skipped=sidecar.skipped,
            short=sidecar.short,
            duplicates=sidecar.duplicates,
            problems=self.problems(),
            ignored=sidecar.ignored,
            notes=notes,
            new_text_bytes=self.sum_of(lambda report: report.text_bytes, resumed=False),
            new_tokens=self.sum_of(lambda report: report.tokens, resumed=False),
        )

    def _take(self, number: int, shard: tuple[Segment, ...], report: ShardReport) -> None:
        self._reports[number] = report
        for segment, records in zip(shard, report.records, strict=True):
            self._records[segment.path] += records
        earlier = sum(len(problems) for other, problems in self._problems.items() if other < number)
        if report.problems and earlier < SHOWN_PROBLEMS:
            self._problems[number] = [
                self._locator.describe(shard[segment], Malformed(Place(place, byte), reason))
                for segment, place, byte, reason in report.problems
            ]

    def _source(self, shard: tuple[Segment, ...]) -> str:
        """Return what a shard is made from, in short: where it differs in anything, so does this."""
        stretches = [(str(s.path.resolve()), *s.identity, s.start, s.stop) for s in shard]
        return hashlib.sha256(json.dumps([self._origin, stretches]).encode()).hexdigest()


def _write(
    made: _Shards,
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    prefix: Path,
    document_shuffle: int | None,
    check: Callable[[], None],
) -> tuple[DatasetSidecar, np.ndarray]:
    """Write the dataset; return its sidecar, and how often each token id occurs."""
    files, recipe = made.files(), made.recipe
    left_out = None
    if recipe.hashed:
        left_out = find_duplicates([shard.hashes for shard in files], made.work.folder("duplicates"), check)
    counts = count_tokens(files, left_out, tokenizer.vocab_size, recipe.dtype)
    if not counts.any():
        made.work.done = True
        raise _nothing_left(made, inputs, prefix)
    with IndexedDatasetWriter(prefix, recipe.dtype, with_loss_mask=recipe.extract.structured) as writer:
        stretches = runs(files, left_out)
        if document_shuffle is None:
            write_in_order(stretches, writer, check)
        else:
            folder = made.work.folder("shuffle")
            write_shuffled(stretches, int(counts.sum()), document_shuffle, folder, writer, check)
        sidecar = DatasetSidecar(
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.digest,
            num_tokens=writer.num_tokens,
            num_documents=writer.num_documents,
            max_token_id=int(counts.nonzero()[0][-1]),
            token_counts_entropy=entropy(counts),
            eod_id=recipe.eod,
            eod_token=_name_of(tokenizer, recipe.eod),
            bos_id=recipe.bos,
            bos_token=_name_of(tokenizer, recipe.bos),
            skipped=made.sum_of(lambda report: report.malformed),
            empty=made.sum_of(lambda report: report.empty),
            short=made.sum_of(lambda report: report.short),
            duplicates=0 if left_out is None else int(np.count_nonzero(left_out)),
            ignored=made.ignored(),
            document_shuffle=document_shuffle,
        )
        writer.finalize(sidecar)
    return sidecar, counts


def _nothing_left(made: _Shards, inputs: Sequence[Path], prefix: Path) -> UserError:
    """Return the error of input without a document that could be written."""
    without = made.without_records(inputs)
    if len(without) == len(inputs):
        (told,) = _notes_on_files(without)
        return UserError(f"{told}, so there is nothing to write; give input with documents")
    short, empty = made.sum_of(lambda report: report.short), made.sum_of(lambda report: report.empty)
    malformed = made.sum_of(lambda report: report.malformed)
    fix = "mend the malformed ones" if malformed else "lower --min-tokens" if short else "give input with text"
    first = f"; the first: {made.problems()[0]}" if made.problems() else ""
    return UserError(
        f"{prefix}: not one document is left to write: {malformed:,} malformed, {short:,} shorter than "
        f"--min-tokens, {empty:,} empty{first}; {fix}"
    )


def entropy(counts: np.ndarray) -> float:
    """Return the entropy of a unigram distribution given by counts, in nats a token."""
    present = counts[counts > 0]
    shares = present / present.sum()
    # math.fsum: the last digit must not hang on numpy's order of summation.
    return math.fsum(-shares * np.log(shares))


def _origin(recipe: Recipe, coder: CoderFiles) -> str:
    chat = coder.chat
    if chat is not None and Path(chat).is_file():
        chat = hashlib.sha256(Path(chat).read_bytes()).hexdigest()
    # Shards without a malformed document are the same under both rules; the others are told apart by their report.
    content = [_SHARD_VERSION, asdict(replace(recipe, keep_going=False)), coder.digest, chat]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _keys(text_key: str | Sequence[str] | None, chat: str | None) -> tuple[str, ...]:
    keys = (text_key,) if isinstance(text_key, str) else tuple(text_key or ())
    if chat is not None and len(keys) > 1:
        raise UserError(f"--text-key={','.join(keys)}: a conversation stands under one key; name one with --chat")
    return keys or (("text",) if chat is None else ())


@dataclass(frozen=True, slots=True)
class _Edge:
    """What stands at an edge of every document, and how it is asked for."""

    option: str
    flag: str
    key: str
    """Where tokenizer_config.json names it."""
    what: str
    own: Callable[[Tokenizer], int | None]


_END = _Edge("--eod-token", "--append-eod", "eos_token", "end-of-document", lambda tokenizer: tokenizer.eod_id)
_BEGINNING = _Edge("--bos-token", "--prepend-bos", "bos_token", "beginning", lambda tokenizer: tokenizer.bos_id)


def _edge(tokenizer: Tokenizer, path: Path, edge: _Edge, wanted: bool, name: str | None) -> int | None:
    """Return the id of the token for an edge of every document, by its name or as the tokenizer says; None for none."""
    if name is not None:
        token = tokenizer.token_id(name)
        if token is None:
            raise UserError(f"{edge.option}={name}: {path} has no such token{nearest(name, tokenizer.control_tokens)}")
        return token
    if not wanted:
        return None
    token = edge.own(tokenizer)
    if token is None:
        told = TokenizerConfig.beside(path).name_of(edge.key)
        token = tokenizer.token_id(told) if told is not None else None
    if token is None:
        raise UserError(f"{path}: has no {edge.what} token for {edge.flag}; name one with {edge.option}")
    return token


def _name_of(tokenizer: Tokenizer, token: int | None) -> str | None:
    return None if token is None else tokenizer.token_name(token)


def _require_one_beginning(template: "ChatTemplate", tokenizer: Tokenizer, bos: int | None) -> None:
    name = _name_of(tokenizer, bos)
    if name is not None and template.start.startswith(name):
        raise UserError(
            f"--prepend-bos: the chat template {template.name} begins with {name!r} already; leave the option out"
        )


def _notes_on_files(without_records: Sequence[Path]) -> list[str]:
    """Return what should be known of files without a record."""
    if not without_records:
        return []
    shown = [str(path) if path.stat().st_size else f"{path} (0 bytes)" for path in without_records[:_SHOWN_FILES]]
    more = f" and {len(without_records) - len(shown):,} more" if len(without_records) > len(shown) else ""
    return [f"{', '.join(shown)}{more}: {'holds' if len(without_records) == 1 else 'hold'} no record"]


def _notes_of(tokenizer: Tokenizer, path: Path) -> list[str]:
    """Return what should be known of a tokenizer."""
    return [f"{path}: {note}" for note in tokenizer.notes]


def _notes_on(tokenizer: Tokenizer, path: Path, recipe: Recipe, counts: np.ndarray) -> list[str]:
    """Return what should be known of the tokens that were made."""
    notes = []
    unknown = tokenizer.unknown_id
    if unknown is not None and counts[unknown]:
        notes.append(
            f"{counts[unknown]:,} tokens ({counts[unknown] / counts.sum():.2%}) are {tokenizer.token_name(unknown)!r}, "
            f"which stands for what {path} has no token for; if they are many, take a tokenizer of such text"
        )
    before = TokenizerConfig.beside(path).puts_before(tokenizer)
    if before is not None and recipe.bos is None and not recipe.extract.structured:
        notes.append(
            f"{path}: puts {tokenizer.token_name(before)!r} before a text, and these documents have none; "
            "--prepend-bos puts it before each"
        )
    return notes


def _require_free(prefix: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Raise UserError where the output would be written over something that is to stay."""
    outputs = [with_suffix(prefix, suffix) for suffix in SUFFIXES]
    for path in filter(Path.exists, outputs):
        for source in inputs:
            if path.samefile(source):
                raise UserError(f"{source}: would be overwritten by --output {prefix}; give another --output")
    # A run that was killed while the finished files got their names has left its folder, and goes on.
    killed = with_suffix(prefix, ".work").is_dir() and not with_suffix(prefix, ".idx").exists()
    if not overwrite and not killed:
        require_new_dataset(prefix)


def _require_options(on_error: str, min_tokens: int, document_shuffle: int | None) -> None:
    if on_error not in ON_ERROR:
        raise UserError(f"--on-error={on_error}{nearest(on_error, ON_ERROR)}")
    if min_tokens < 0:
        raise UserError(f"--min-tokens={min_tokens}: allowed are 0 and more; leave it away for all documents")
    if document_shuffle is not None and not 0 <= document_shuffle < 1 << 32:
        raise UserError(f"--document-shuffle={document_shuffle}: a seed is 0 to {(1 << 32) - 1}; use 1234")


def _usable_workers(wanted: int | None, total_bytes: int) -> int:
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # A process takes about as long to start as a core takes to encode this much.
        return max(1, min(cores, total_bytes // _BYTES_FOR_A_WORKER))
    if wanted < 1:
        raise UserError(f"--workers={wanted}: allowed are 1 and more; leave it away for one a core")
    return wanted
