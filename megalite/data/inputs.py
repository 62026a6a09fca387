"""Text in: the input files, cut at line ends into chunks, and the documents in each chunk.

A ``.jsonl`` or ``.jsonl.gz`` file holds one JSON object a line; the string under the text key is a document. A
``.txt`` file has no marks between documents: it is cut at blank lines into documents of about 64 KiB, nothing
added and nothing lost, so that one long book can still be split into training and validation.

A chunk depends on the file alone, never on who reads it, which is what makes the output of `preprocess` the same
for any number of workers.
"""

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from megalite.errors import UserError, nearest

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
CHUNK_BYTES = 1 << 20
TEXT_DOCUMENT_BYTES = 1 << 16

_UNREADABLE_TEXT = (".json", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".parquet", ".txt.gz")
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of one file: bytes `start` to `stop` of its text."""

    path: Path
    start: int
    stop: int
    disk_bytes: int
    """The bytes of the file that this chunk takes up, compressed if the file is."""
    data: bytes | None = None
    """The text itself where the file is compressed and cannot be read from the middle."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """What is wrong with a line; `line` counts from 1 at the head of the chunk."""

    line: int
    reason: str


def find_inputs(inputs: Sequence[Path]) -> list[Path]:
    """Return the files to read: each file as given, each folder's files in the order of their names.

    Raises UserError for what does not exist, for a format that is not read, and for a folder without text.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += _files_of_folder(path)
        elif not path.exists():
            neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"{path}: no such file or folder{nearest(path.name, neighbours) if neighbours else ''}")
        elif not path.name.endswith(SUFFIXES):
            raise _unreadable(path)
        else:
            files.append(path)
    return files


def chunks(path: Path, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut a file at line ends into chunks of at least `chunk_bytes`; raise UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            cut = _compressed_chunks if path.name.endswith(".gz") else _plain_chunks
            yield from cut(path, file, chunk_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}; give a whole, readable file") from error


def read(chunk: Chunk) -> bytes:
    """Return the bytes of a chunk; raise UserError where the file has shrunk since it was cut."""
    if chunk.data is not None:
        return chunk.data
    with chunk.path.open("rb") as file:
        file.seek(chunk.start)
        data = file.read(chunk.stop - chunk.start)
    if len(data) != chunk.stop - chunk.start:
        raise UserError(
            f"{chunk.path}: ends at byte {chunk.start + len(data)}, was {chunk.stop} a moment ago; leave it"
        )
    return data


def parse(chunk: Chunk, data: bytes, text_key: str) -> Iterator[str | Malformed]:
    """Yield each document of a chunk, or what is wrong with its line; a blank line of a jsonl file is none."""
    if chunk.path.name.endswith(".txt"):
        yield from _parse_text(data)
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line and not line.isspace():
            try:
                yield _text_of(line, text_key)
            except ValueError as error:
                yield Malformed(number, str(error))


def documents(
    inputs: Sequence[Path], text_key: str, progress: Callable[[int, int], None] | None = None
) -> Iterator[str]:
    """Yield every document in order; raise UserError, naming file and line, at the first that is malformed.

    `progress` is told the bytes read so far and the bytes there are.
    """
    files = find_inputs(inputs)
    total, done = disk_bytes(files), 0
    for path in files:
        lines = 0
        for chunk in chunks(path):
            data = read(chunk)
            for document in parse(chunk, data, text_key):
                if isinstance(document, Malformed):
                    raise UserError(f"{path}:{lines + document.line}: {document.reason}")
                yield document
            lines += data.count(b"\n")
            done += chunk.disk_bytes
            if progress:
                progress(done, total)


def disk_bytes(files: Sequence[Path]) -> int:
    """Return what the files take up together, in bytes."""
    return sum(path.stat().st_size for path in files)


def _files_of_folder(folder: Path) -> list[Path]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    for path in found:
        if path.name.endswith(_UNREADABLE_TEXT):
            raise _unreadable(path)
    files = [path for path in found if path.name.endswith(SUFFIXES)]
    if not files:
        raise UserError(f"{folder}: holds no text; {', '.join(SUFFIXES)} files are read")
    return files


def _unreadable(path: Path) -> UserError:
    return UserError(f"{path}: this format is not read; allowed: {', '.join(SUFFIXES)}; convert it, or leave it out")


def _plain_chunks(path: Path, file, chunk_bytes: int) -> Iterator[Chunk]:
    size = os.fstat(file.fileno()).st_size
    start = 0
    while start < size:
        file.seek(start + chunk_bytes)
        file.readline()
        stop = min(file.tell(), size)
        yield Chunk(path, start, stop, disk_bytes=stop - start)
        start = stop


def _compressed_chunks(path: Path, file, chunk_bytes: int) -> Iterator[Chunk]:
    start = taken = 0
    with gzip.GzipFile(fileobj=file) as stream:
        while data := stream.read(chunk_bytes) + stream.readline():
            yield Chunk(path, start, start + len(data), disk_bytes=file.tell() - taken, data=data)
            start, taken = start + len(data), file.tell()


def _parse_text(data: bytes) -> Iterator[str | Malformed]:
    start = 0
    for stop in [*(blank.end() for blank in _BLANK_LINES.finditer(data)), len(data)]:
        if stop - start >= TEXT_DOCUMENT_BYTES or start < stop == len(data):
            try:
                yield data[start:stop].decode()
            except UnicodeDecodeError as error:
                bad = start + error.start
                yield Malformed(data.count(b"\n", 0, bad) + 1, _not_utf8(bad - data.rfind(b"\n", 0, bad)))
            start = stop


def _text_of(line: bytes, text_key: str) -> str:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as encoding:
            raise ValueError(_not_utf8(encoding.start + 1)) from error
        raise ValueError(f"invalid JSON ({error}); a line holds one JSON object") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}; a line holds one JSON object")
    if text_key not in record:
        raise ValueError(f"no key {text_key!r}{nearest(text_key, record)}")
    if not isinstance(record[text_key], str):
        raise ValueError(f"key {text_key!r} holds {_json_type(record[text_key])}; a document is a string")
    return record[text_key]


def _json_type(value: object) -> str:
    return "null" if value is None else f"a JSON {type(value).__name__}"


def _not_utf8(column: int) -> str:
    return f"invalid UTF-8 at byte {column} of the line; text is UTF-8"
