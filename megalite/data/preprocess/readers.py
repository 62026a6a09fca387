"""The documents of a shard, in batches of about a megabyte, each with the place where it stands.

A line of a ``.jsonl`` file is one JSON object, and so is an element of a JSON array; the string under the text key is
a document, and several keys are joined by a line end. A key ``a.b`` is looked up in the object under ``a``. A ``.txt``
file is one document, or with `split_lines` one a line. A row of a ``.parquet`` or ``.arrow`` file is what an object is.
Blank lines are no documents.
"""

import codecs
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megalite.data.preprocess import arrow_tables
from megalite.data.preprocess.inputs import (
    MAX_LINE_BYTES,
    Segment,
    disk_bytes,
    find_inputs,
    is_compressed,
    open_text,
    reading,
    shards,
)
from megalite.data.preprocess.long_text import LONGEST_WHOLE, LongText
from megalite.data.preprocess.source_location import Locator, Malformed, Place
from megalite.errors import UserError, nearest

_BLOCK_BYTES = 1 << 20


@dataclass(slots=True)
class Batch:
    """Documents in a row, with their places, and what is no document; strings, `LongText` or conversations."""

    documents: list[Any] = field(default_factory=list)
    places: Sequence[Place] = field(default_factory=list)
    malformed: list[Malformed] = field(default_factory=list)
    text_bytes: int = 0
    disk_bytes: float = 0

    def add(self, place: Place, document: Any) -> None:
        """Append a document."""
        assert isinstance(self.places, list)
        self.documents.append(document)
        self.places.append(place)


@dataclass(frozen=True, slots=True)
class _Lines(Sequence[Place]):
    """The places of lines in a row, found only where somebody asks."""

    first: int
    start: int
    lines: list[bytes]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: Any) -> Any:
        before = self.lines[: range(len(self.lines))[index]]
        return Place(self.first + len(before), self.start + sum(map(len, before)) + len(before))


@dataclass(frozen=True, slots=True)
class Extract:
    """What of an object is the document: the text under a key, or under several, joined by a line end."""

    keys: tuple[str, ...] = ("text",)
    split_lines: bool = False
    structured: bool = False
    """The object is taken as it is, a conversation say; a list under the one key stands there as its ``messages``."""

    def of(self, record: object) -> Any:
        """Return the document of an object of JSON; raise ValueError, saying why, where there is none."""
        if not isinstance(record, dict):
            raise ValueError(f"a JSON {type(record).__name__}; a line holds one JSON object")
        texts = []
        for key in self.keys:
            found, holder, name = _look_up(record, key)
            if not found:
                fix = "conversations take --chat" if "messages" in record else "--text-key names the text's"
                raise ValueError(f"no key {key!r}{nearest(name, holder)} ({fix})")
            if not self.structured and not isinstance(holder[name], str):
                raise ValueError(f"key {key!r} holds {_json_type(holder[name])}; a document is a string")
            texts.append(holder[name])
        if self.structured:
            return _with_messages(record, self.keys[0], texts[0]) if self.keys else record
        return texts[0] if len(texts) == 1 else "\n".join(filter(None, texts))


def _look_up(record: dict[Any, Any], key: str) -> tuple[bool, dict[Any, Any], str]:
    """Return whether there is a key ``a.b``, the object in which its last part stands or should, and that part."""
    if key in record:
        return True, record, key
    dot = key.find(".")
    while dot >= 0:
        inner = record.get(key[:dot])
        if isinstance(inner, dict):
            return _look_up(inner, key[dot + 1 :])
        dot = key.find(".", dot + 1)
    return False, record, key


def _with_messages(record: dict[Any, Any], key: str, value: Any) -> Any:
    """Return the object of a conversation that stands under a key, with what stands beside it, all of which counts."""
    if not isinstance(value, list | dict):
        return value
    _, holder, name = _look_up(record, key)
    beside = {other: content for other, content in record.items() if other != key}
    if holder is not record:
        top = key.split(".", maxsplit=1)[0]
        inner = {f"{top}.{other}": content for other, content in holder.items() if other != name}
        beside = {other: content for other, content in beside.items() if other != top} | inner
    if isinstance(value, dict):
        return beside | value
    # What else is called so is no part of it, and is told as passed over.
    return {("other messages" if other == "messages" else other): content for other, content in beside.items()} | {
        "messages": value
    }


def read(segment: Segment, extract: Extract) -> Iterator[Batch]:
    """Yield the documents of a segment; raise UserError where the file cannot be read or has changed."""
    if segment.form in arrow_tables.FORMS:
        batches = _read_table
    elif segment.form == "txt" and not extract.split_lines:
        batches = _read_whole
    else:
        batches = _read_lines
    with reading(segment.path):
        yield from batches(segment, extract)
    segment.require_unchanged()


def documents(
    inputs: Sequence[Path],
    text_keys: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[str]:
    """Yield every text in order, long ones in parts; raise UserError at the first that is malformed.

    `progress` is told the bytes read so far and the bytes there are.
    """
    files = find_inputs(inputs)
    total, done = disk_bytes(files), 0.0
    extract = Extract(tuple(text_keys))
    for shard in shards(files, split_lines=False):
        for segment in shard:
            for batch in read(segment, extract):
                for malformed in batch.malformed:
                    raise UserError(Locator().describe(segment, malformed))
                for document in batch.documents:
                    yield from [document] if isinstance(document, str) else document.parts()
                done += batch.disk_bytes
                if progress:
                    progress(min(round(done), total), total)


def _read_lines(segment: Segment, extract: Extract) -> Iterator[Batch]:
    parse = extract.of if segment.form == "jsonl" else None
    key = extract.keys[0] if parse and len(extract.keys) == 1 and not extract.structured else None
    number = 0
    for start, data, complete in _whole_lines(segment):
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        batch = None
        if key is not None and complete and len(data) <= LONGEST_WHOLE:
            batch = _plain_batch(lines, key, _Lines(number + 1, start, lines))
        if batch is None:
            batch = _checked_batch(lines if complete else lines[:-1], number, start, parse)
        number += len(lines)
        if not complete:
            place = Place(number, start + len(data) - len(lines[-1]) - data.endswith(b"\n"))
            batch.malformed.append(Malformed(place, _too_long("line")))
        if segment.of_array:
            batch.malformed = [
                Malformed(one.place, one.reason.replace("a line holds", "an element is")) for one in batch.malformed
            ]
        batch.text_bytes = len(data)
        batch.disk_bytes = _share(segment, len(data))
        yield batch


def _plain_batch(lines: list[bytes], key: str, places: _Lines) -> Batch | None:
    """Return the documents of lines all of which hold one, which is nearly always; else None."""
    try:
        texts = [record[key] for record in map(orjson.loads, lines)]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return Batch(texts, places) if set(map(type, texts)) == {str} else None


def _checked_batch(lines: list[bytes], number: int, at: int, parse: Callable[[object], Any] | None) -> Batch:
    batch = Batch()
    for line in lines:
        number += 1
        if line and not line.isspace():
            place = Place(number, at)
            try:
                batch.add(place, _document(line, at, parse))
            except _Malformed as error:
                batch.malformed.append(Malformed(Place(number, error.byte), error.reason))
            except ValueError as error:
                batch.malformed.append(Malformed(place, str(error)))
        at += len(line) + 1
    return batch


def _share(segment: Segment, text_bytes: int) -> float:
    return text_bytes * segment.disk_bytes / max(segment.stop - segment.start, 1)


class _Malformed(ValueError):
    def __init__(self, byte: int, reason: str) -> None:
        super().__init__(reason)
        self.byte = byte
        self.reason = reason


def _document(line: bytes, at: int, parse: Callable[[object], Any] | None) -> Any:
    if at == 0 and line.startswith(codecs.BOM_UTF8):
        line, at = line.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
    if parse is None:
        try:
            document = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise _Malformed(at + error.start, _NOT_UTF8) from error
    else:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise _broken_json(line, at, error) from error
        document = parse(record)
    return _long_if_long(document)


def _broken_json(line: bytes, at: int, error: orjson.JSONDecodeError) -> _Malformed:
    try:
        text = line.decode()
    except UnicodeDecodeError as encoding:
        return _Malformed(at + encoding.start, _NOT_UTF8)
    place = at + len(text[: error.pos].encode())
    fix = "a line holds one JSON object"
    if error.pos >= len(text.rstrip()):
        fix += " and all of it; to write an object in several lines, put all of them into one JSON array"
    return _Malformed(place, f"invalid JSON ({error.msg}); {fix}")


def _whole_lines(segment: Segment) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (place, lines, whether the last one is complete) of the lines that begin within a segment."""
    if segment.data is not None:
        stream, position, stop, offset = io.BytesIO(segment.data), 0, len(segment.data), segment.start
    else:
        stream, position, stop, offset = segment.path.open("rb"), segment.start, segment.stop, 0
    with stream:
        if segment.data is None and position:
            # The line that reaches into this range begins in another: it is that one's.
            stream.seek(position - 1)
            position += _rest_of_line(stream, stop - position + 1) - 1
        while position < stop:
            data = stream.read(min(_BLOCK_BYTES, stop - position))
            if not data:
                raise EOFError(f"ends at byte {position}, was {stop} a moment ago")
            complete, skipped = True, 0
            if not data.endswith(b"\n"):
                data += stream.readline(MAX_LINE_BYTES + 1)
                if len(data) - (data.rfind(b"\n", 0, len(data) - 1) + 1) > MAX_LINE_BYTES:
                    complete = False
                    skipped = 0 if data.endswith(b"\n") else _rest_of_line(stream)
            yield position + offset, data, complete
            position += len(data) + skipped


def _rest_of_line(stream: Any, limit: int | None = None) -> int:
    """Read to the end of a line, or at least `limit` bytes of it; return how far."""
    passed = 0
    while (limit is None or passed < limit) and (part := stream.readline(_BLOCK_BYTES)):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _read_whole(segment: Segment, extract: Extract) -> Iterator[Batch]:
    batch = Batch(disk_bytes=segment.disk_bytes)
    place = Place(1, 0)
    if not is_compressed(segment.path) and segment.stop <= LONGEST_WHOLE:
        data = segment.path.read_bytes()
        batch.text_bytes = len(data)
        try:
            batch.add(place, data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            batch.malformed.append(Malformed(Place(line, error.start), _NOT_UTF8))
    else:
        # Read twice: what has tokens already must not turn out to be malformed.
        batch.text_bytes, malformed = _check_utf8(segment.path)
        if malformed:
            batch.malformed.append(malformed)
        elif not batch.text_bytes:
            batch.add(place, "")
        else:
            batch.add(place, LongText(lambda: _decoded(segment.path)))
    yield batch


def _check_utf8(path: Path) -> tuple[int, Malformed | None]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = lines = 0
    with open_text(path) as file:
        while True:
            data = file.read(_BLOCK_BYTES)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                bad = size - held + error.start
                lines += data.count(b"\n", 0, max(error.start - held, 0))
                return size, Malformed(Place(lines + 1, bad), _NOT_UTF8)
            if not data:
                return size, None
            size += len(data)
            lines += data.count(b"\n")


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with reading(path), open_text(path) as file:
        while data := file.read(_BLOCK_BYTES):
            yield decoder.decode(data)


def _read_table(segment: Segment, extract: Extract) -> Iterator[Batch]:
    number = 0
    for columns in arrow_tables.rows(segment.path, segment.start, segment.stop, extract.keys, whole=extract.structured):
        batch = Batch()
        for values in zip(*columns.values(), strict=True):
            number += 1
            place = Place(number, None)
            try:
                record = dict(zip(columns, map(_decode, values), strict=True))
                batch.text_bytes += sum(len(value) for value in values if isinstance(value, bytes))
                batch.add(place, _long_if_long(extract.of(record)))
            except ValueError as error:
                batch.malformed.append(Malformed(place, str(error)))
        yield batch
    # How much of the file a batch was is known only here.
    yield Batch(disk_bytes=segment.disk_bytes)


def _decode(value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    if len(value) > MAX_LINE_BYTES:
        raise ValueError(_too_long("document"))
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} of the document; text is UTF-8") from error


def _long_if_long(document: Any) -> Any:
    if isinstance(document, str) and len(document) > LONGEST_WHOLE:
        return LongText(lambda: _blocks(document))
    return document


def _blocks(text: str) -> Iterable[str]:
    return (text[at : at + LONGEST_WHOLE] for at in range(0, len(text), LONGEST_WHOLE))


def _json_type(value: object) -> str:
    return "null" if value is None else f"a JSON {type(value).__name__}"


_NOT_UTF8 = "invalid UTF-8; text is UTF-8"


def _too_long(what: str) -> str:
    return f"a {what} of more than {MAX_LINE_BYTES:,} bytes; cut it, or give it as a .txt file, which has no such limit"
