"""Text in: which files are read, and how they are cut into shards that any process can read on its own.

A shard is stretches of files: a range of bytes of a file of lines, row groups of a parquet file, record batches of an
arrow file, whole small files. Where a shard begins and ends depends on the files alone, never on who reads it. A
compressed file of lines cannot be read from the middle: it is unpacked where the shards are cut, and its shards hold
their text. Nor can a JSON array: it is cut into elements there, which the shards hold as lines (`json_arrays`).
"""

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path

from megalite.data.preprocess import arrow_tables
from megalite.data.preprocess.json_arrays import elements, holds_array
from megalite.data.preprocess.zstd import ZstdError, ZstdReader
from megalite.errors import UserError, did_you_mean
from megalite.text_encoding import HEAD_BYTES, require_utf8

SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".txt", ".txt.gz", ".txt.zst"),
    # Files of these names hold anything: they are taken as JSON lines where they are given by name.
    *(".json", ".json.gz", ".json.zst", ".ndjson"),
)
MAX_LINE_BYTES = 1 << 26
"""Of one line, which is one document: what memory is bounded by."""

_IN_FOLDERS = SUFFIXES[:8]
_UNREADABLE_TEXT = (".jsonl.bz2", ".jsonl.xz", ".txt.bz2", ".txt.xz", ".csv", ".tsv")
_SMALLEST_SHARD, _LARGEST_SHARD, _SHARDS = 1 << 20, 1 << 26, 256


@dataclass(frozen=True)
class Segment:
    """A stretch of one file: bytes of text, row groups of parquet or record batches of arrow from `start` to `stop`."""

    path: Path
    start: int
    stop: int
    disk_bytes: int
    """The bytes of the file that this stretch takes up, compressed if the file is."""
    identity: tuple[int, int]
    """Size and time of change of the file when it was cut."""
    rows_before: int = 0
    """Rows of a table, or lines of a compressed file, before this stretch."""
    data: bytes | None = None
    """The text itself where the file cannot be read from the middle."""
    of_array: bool = False
    """The lines of the text are the elements of a JSON array."""

    @cached_property
    def form(self) -> str:
        """``jsonl``, ``txt``, ``parquet`` or ``arrow``."""
        return form_of(self.path)

    def require_unchanged(self) -> None:
        """Raise UserError where the file is no longer what was cut."""
        if identity_of(self.path) != self.identity:
            raise UserError(f"{self.path}: changed while it was read; leave it alone until preprocess is done")


def find_inputs(inputs: Sequence[Path]) -> list[Path]:
    """Return the files to read: files as given, what matches a pattern, each folder's, in the order of their names.

    Raises UserError for what does not exist, for a format that is not read, and for a folder without text.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += _files_of_folder(path)
        elif path.exists():
            files.append(_readable(path))
        elif matches := sorted(glob(str(path), recursive=True)):
            files += [_readable(Path(match)) for match in matches if not Path(match).is_dir()]
        else:
            neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"{path}: no such file or folder{did_you_mean(path.name, neighbours)}")
    return files


def form_of(path: Path) -> str:
    """Return what a file holds by its name, however it is compressed."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    form = name.rpartition(".")[2]
    return "jsonl" if form in ("json", "ndjson") else form


def is_compressed(path: Path) -> bool:
    """Tell whether a file has to be unpacked."""
    return path.name.endswith((".gz", ".zst"))


def open_text(path: Path) -> io.BufferedIOBase:
    """Open the bytes of a file of text, unpacked; read it under `reading`."""
    if path.name.endswith(".gz"):
        return gzip.GzipFile(path)
    if path.name.endswith(".zst"):
        return io.BufferedReader(ZstdReader(path.open("rb")), 1 << 20)
    return path.open("rb")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what can go wrong with a file that is read into a UserError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, ZstdError, arrow_tables.BrokenTable) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {reason}; give a whole, readable file") from error


def identity_of(path: Path) -> tuple[int, int]:
    """Return size and time of change of a file."""
    with reading(path):
        status = path.stat()
    return status.st_size, status.st_mtime_ns


def shard_bytes_for(total_bytes: int) -> int:
    """Return how large a shard of so much input is: small enough to share out, large enough to be few."""
    return min(max(total_bytes // _SHARDS, _SMALLEST_SHARD), _LARGEST_SHARD)


def shards(
    files: Sequence[Path], *, split_lines: bool, shard_bytes: int | None = None
) -> Iterator[tuple[Segment, ...]]:
    """Cut files into shards, in order; raise UserError where one cannot be read."""
    size = shard_bytes or shard_bytes_for(disk_bytes(files))
    gathered: list[Segment] = []
    held = 0
    for path in files:
        for segment in segments(path, size, split_lines=split_lines):
            takes = len(segment.data) if segment.data is not None else segment.disk_bytes
            if gathered and held + takes > size:
                yield tuple(gathered)
                gathered, held = [], 0
            gathered.append(segment)
            held += takes
    if gathered:
        yield tuple(gathered)


def segments(path: Path, size: int, *, split_lines: bool) -> Iterator[Segment]:
    """Cut one file into segments of about `size` bytes where its format allows it."""
    identity = identity_of(path)
    form = form_of(path)
    with reading(path):
        if form not in arrow_tables.FORMS:
            _require_utf8(path)
        if form in arrow_tables.FORMS:
            for start, stop, taken, rows in arrow_tables.cut(path, size):
                yield Segment(path, start, stop, taken, identity, rows)
        elif form == "txt" and not split_lines:
            yield Segment(path, 0, identity[0], identity[0], identity)
        elif form == "jsonl" and _is_array(path):
            yield from _elements(path, identity, size)
        elif is_compressed(path):
            yield from _unpacked(path, identity, size)
        else:
            for start in range(0, identity[0], size):
                stop = min(start + size, identity[0])
                yield Segment(path, start, stop, stop - start, identity)


def disk_bytes(files: Sequence[Path]) -> int:
    """Return what the files take up together, in bytes."""
    return sum(identity_of(path)[0] for path in files)


def _require_utf8(path: Path) -> None:
    with open_text(path) as stream:
        require_utf8(path, stream.read(HEAD_BYTES))


def _is_array(path: Path) -> bool:
    with open_text(path) as stream:
        return holds_array(stream, MAX_LINE_BYTES)


def _elements(path: Path, identity: tuple[int, int], size: int) -> Iterator[Segment]:
    with path.open("rb") as file, _unpack(path, file) if is_compressed(path) else nullcontext(file) as stream:
        taken = 0
        for part in elements(stream, path, size, MAX_LINE_BYTES):
            stop, at = part.start + len(part.data), file.tell()
            yield Segment(path, part.start, stop, at - taken, identity, part.before, part.data, of_array=True)
            taken = at


def _unpacked(path: Path, identity: tuple[int, int], size: int) -> Iterator[Segment]:
    with path.open("rb") as packed, _unpack(path, packed) as stream:
        start = taken = lines = 0
        while data := stream.read(size):
            rest = b"" if data.endswith(b"\n") else stream.readline(MAX_LINE_BYTES + 1)
            # Of a line without end its head is enough to refuse it.
            skipped = _skip_line(stream) if len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n") else 0
            data += rest
            stop = start + len(data) + skipped
            yield Segment(path, start, stop, packed.tell() - taken, identity, lines, data)
            start, taken = stop, packed.tell()
            lines += data.count(b"\n") + (skipped > 0)


def _unpack(path: Path, packed: io.BufferedReader) -> io.BufferedIOBase:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=packed)
    return io.BufferedReader(ZstdReader(packed), 1 << 20)


def _skip_line(stream: io.BufferedIOBase) -> int:
    skipped = 0
    while part := stream.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _files_of_folder(folder: Path) -> list[Path]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    for path in found:
        if path.name.endswith(_UNREADABLE_TEXT):
            raise _unreadable(path)
    files = [path for path in found if path.name.endswith(_IN_FOLDERS)]
    if not files:
        fix = f"name others by a pattern, such as '{folder}/*.json'" if found else "give another folder"
        raise UserError(f"{folder}: holds no text; {', '.join(_IN_FOLDERS)} files are read; {fix}")
    return files


def _readable(path: Path) -> Path:
    if not path.name.endswith(SUFFIXES):
        raise _unreadable(path)
    return path


def _unreadable(path: Path) -> UserError:
    return UserError(f"{path}: this format is not read; allowed: {', '.join(SUFFIXES)}; convert it, or leave it out")
