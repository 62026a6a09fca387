import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.data.preprocess import inputs, long_text, readers
from megalite.data.preprocess.inputs import identity_of, segments
from megalite.data.preprocess.long_text import LongText
from megalite.data.preprocess.readers import Extract, documents, read
from megalite.data.preprocess.source_location import Locator
from megalite.errors import UserError

SPLIT = Extract(split_lines=True)


def read_all(path: Path, extract: Extract = Extract(), size: int = 1 << 20) -> list[object]:  # noqa: B008
    """The documents, in order, as strings, and what is malformed as it would be told."""
    locator = Locator()
    found: list[tuple[int, int, object]] = []
    for number, segment in enumerate(segments(path, size, split_lines=extract.split_lines)):
        for batch in read(segment, extract):
            assert len(batch.documents) == len(batch.places)
            for document, place in zip(batch.documents, batch.places, strict=True):
                text = "".join(document.parts()) if isinstance(document, LongText) else document
                found.append((number, place.number, text))
            for malformed in batch.malformed:
                problem = locator.describe(segment, malformed).replace(str(path), "")
                found.append((number, malformed.place.number, problem))
    return [item for _, _, item in sorted(found, key=lambda item: item[:2])]


def write_as(folder: Path, texts: Sequence[str | None]) -> dict[str, Path]:
    """The same documents in every format that holds any text."""
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    table = pyarrow.table({"id": [1] * len(texts), "text": pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    with pyarrow.ipc.new_stream(folder / "a.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    with pyarrow.ipc.new_file(folder / "file.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=7)
    for name, kind in (("large", pyarrow.large_string()), ("view", pyarrow.string_view())):
        other = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()).cast(kind)})
        with pyarrow.ipc.new_stream(folder / f"{name}.arrow", other.schema) as stream:
            stream.write_table(other)
    dictionary = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()).dictionary_encode()})
    pyarrow.parquet.write_table(dictionary, folder / "dictionary.parquet")
    return {path.name: path for path in folder.iterdir()}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=20), st.integers(1, 300))
def test_every_format_gives_the_same_documents_wherever_it_is_cut(tmp_path_factory, texts, size):
    for name, path in write_as(tmp_path_factory.mktemp("texts"), texts).items():
        assert read_all(path, size=size) == texts, name


def test_a_line_that_spans_many_shards_is_read_once(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["x" * 3000, "a", "y" * 500, "b"]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for size in (10, 64, 511, 3013, 3014, 3015):
        assert read_all(path, size=size) == texts


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    text = "first\r\n\nsecond é\n\n"
    path = tmp_path / f"a.txt{suffix}"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path.write_bytes(pack(text.encode()))
    assert read_all(path, size=4) == [text]
    assert read_all(path, SPLIT, size=4) == ["first", "second é"]


def test_a_long_text_file_is_one_document_in_bounded_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 1001)  # cuts characters in the middle
    for name, value in (("LONGEST_WHOLE", 2000), ("PART", 1000)):
        monkeypatch.setattr(long_text, name, value)
    monkeypatch.setattr(readers, "LONGEST_WHOLE", 2000)
    text = "".join(f"line {n} schöne Wörter 漢字\n" for n in range(2000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    for name in ("a.txt", "a.jsonl"):
        (segment,) = segments(tmp_path / name, 1 << 20, split_lines=False)
        ((document,),) = [batch.documents for batch in read(segment, Extract())]
        assert isinstance(document, LongText)
        parts = list(document.parts())
        assert "".join(parts) == text
        assert len(parts) > 20
        assert all(part.endswith("\n") for part in parts)
        assert all(1000 <= len(part) <= 2000 for part in parts[:-1])
        assert list(document.parts()) == parts


def test_parts_end_where_tokenizers_split_anyway(monkeypatch):
    monkeypatch.setattr(long_text, "LONGEST_WHOLE", 40)
    monkeypatch.setattr(long_text, "PART", 20)

    def parts(text: str) -> list[str]:
        return list(LongText(lambda: [text]).parts())

    assert parts("x" * 25 + "\nnext line" + " " * 10)[0] == "x" * 25 + "\n"
    assert parts("x" * 25 + "\n  next line" + "y" * 10)[0] == "x" * 25 + "\n  next"
    assert parts("x" * 50)[0] == "x" * 20


def test_blank_lines_and_foreign_line_ends_are_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\r\n \t\n{"text": "a"}\r\n\n{"text": "b"}')
    assert read_all(path) == ["a", "b"]


def test_an_empty_file_of_lines_holds_nothing_and_one_of_text_an_empty_document(tmp_path):
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b"")
    assert read_all(tmp_path / "a.jsonl") == []
    assert read_all(tmp_path / "a.txt") == [""]


@pytest.mark.parametrize(
    ("name", "extract"), [("a.jsonl", Extract()), ("a.txt", Extract()), ("a.txt", Extract(split_lines=True))]
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, extract):
    text = "héllo" if name == "a.txt" else '{"text": "héllo"}'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_all(tmp_path / name, extract) == ["héllo"]


def test_the_texts_under_several_keys_are_joined(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "T", "text": "body"}\n{"text": "only", "title": ""}\n{"text": "no title"}\n')
    extract = Extract(("title", "text"))
    assert read_all(path, extract)[:2] == ["T\nbody", "only"]
    assert read_all(path, extract)[2] == ":3: byte 61: no key 'title'; allowed: text (--text-key names the text's)"
    table = pyarrow.table({"text": ["body"], "title": ["T"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet", extract) == ["T\nbody"]


def test_conversations_are_taken_as_they_are(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"messages": [turns]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read_all(tmp_path / name, Extract(("messages",), structured=True)) == [{"messages": turns}]
        assert read_all(tmp_path / name, Extract((), structured=True)) == [{"messages": turns}]


BAD_LINES = [
    (b'{"text": "a"', 12, "invalid JSON"),
    ('{"é": "a" 3}'.encode(), 11, "invalid JSON"),
    (b"{'text': 'a'}", 1, "invalid JSON"),
    (b'{"text": "\\ud800"}', 10, "invalid JSON"),
    (b'["text"]', 0, "a JSON list; a line holds one JSON object"),
    (b'"text"', 0, "a JSON str; a line holds one JSON object"),
    (b'{"texts": "a", "id": 1}', 0, "no key 'text'; did you mean 'texts'?"),
    (b'{"content": "a"}', 0, "no key 'text'; allowed: content"),
    (b'{"text": null}', 0, "key 'text' holds null; a document is a string"),
    (b'{"text": 3}', 0, "key 'text' holds a JSON int; a document is a string"),
    (b'{"text": "abc\xff"}', 13, "invalid UTF-8"),
]


@pytest.mark.parametrize(("line", "byte", "reason"), BAD_LINES)
@pytest.mark.parametrize("size", [1 << 20, 7, 20])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_malformed_line_is_named_by_line_and_byte(tmp_path, line, byte, reason, size, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    data = b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}\n'
    path.write_bytes(gzip.compress(data) if suffix else data)
    first, malformed, last = read_all(path, size=size)
    assert (first, last) == ("good", "also good")
    assert str(malformed).startswith(f":3: byte {18 + byte}: {reason}")
    with pytest.raises(UserError, match=r"a\.jsonl(\.gz)?:3: "):
        list(documents([path], ["text"]))


@pytest.mark.parametrize("extract", [Extract(), SPLIT])
def test_invalid_utf8_in_text_is_named_by_line_and_byte(tmp_path, extract, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nth\xffree\n")
    assert ":3: byte 10: invalid UTF-8; text is UTF-8" in read_all(path, extract)
    monkeypatch.setattr(readers, "LONGEST_WHOLE", 4)
    for block in range(1, 20):
        monkeypatch.setattr(readers, "_BLOCK_BYTES", block)
        assert ":3: byte 10: invalid UTF-8; text is UTF-8" in read_all(path, extract)
        (tmp_path / "b.txt").write_bytes("one\nté漢".encode()[:-1])
        assert ":2: byte 7: invalid UTF-8; text is UTF-8" in read_all(tmp_path / "b.txt", extract)


def test_malformed_rows_of_tables_are_named(tmp_path):
    for name, path in write_as(tmp_path, ["good", None, "fine"]).items():
        if name.endswith(("parquet", "arrow")):
            assert read_all(path) == ["good", ": row 2: key 'text' holds null; a document is a string", "fine"], name
    values = pyarrow.array([b"good", b"ab\xff", b"x"] * 5, pyarrow.binary())
    table = pyarrow.Table.from_arrays([values.view(pyarrow.string())], ["text"])
    with pyarrow.ipc.new_file(tmp_path / "bad.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=3)
    found = read_all(tmp_path / "bad.arrow", size=10)
    assert found[4] == ": row 5: invalid UTF-8 at byte 2 of the document; text is UTF-8"
    assert found[::3] == ["good"] * 5


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_without_the_column_is_refused(tmp_path, name):
    table = pyarrow.table({"texts": ["a"], "n": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(
        UserError, match=rf"{name}: no column 'text'; did you mean 'texts'\?; say which with --text-key"
    ):
        read_all(tmp_path / name)
    assert read_all(tmp_path / name, Extract(("n",))) == [": row 1: key 'n' holds a JSON int; a document is a string"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_beyond_the_limit_is_refused_and_the_rest_is_read(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 200)
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(inputs, "MAX_LINE_BYTES", 200)
    for length in (190, 5000):
        long = json.dumps({"text": "x" * length})
        lines = ['{"text": "a"}', '{"text": "b"}', long, '{"text": "c"}', long]
        data = "\n".join(lines).encode()
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(gzip.compress(data) if suffix else data)
        for size in (10, 64, 300, 1 << 20):
            a, b, third, c, fifth = read_all(path, size=size)
            assert (a, b, c) == ("a", "b", "c")
            assert str(third).startswith(":3: byte 28: a line of more than 200 bytes; cut it")
            assert str(fifth).startswith(f":5: byte {28 + len(long) + 15}: a line of more than 200 bytes")


def test_a_file_that_changes_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    (segment,) = segments(path, 1 << 20, split_lines=False)
    path.write_bytes(b'{"text"')
    with pytest.raises(UserError, match="cannot be read: ends at byte 7, was 14"):
        list(read(segment, Extract()))
    path.write_bytes(b'{"text": "b"}\n')
    os.utime(path, ns=(1, 1))
    assert identity_of(path) != segment.identity
    with pytest.raises(UserError, match="changed while it was read"):
        list(read(segment, Extract()))


def test_progress_ends_at_the_total(tmp_path):
    told = []
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert list(documents([tmp_path], ["text"], lambda done, total: told.append((done, total)))) == ["a", "a"]
    assert told == [(14, 28), (28, 28)]


@pytest.mark.parametrize(
    "kind", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "file.arrow", "a.txt"]
)
def test_broken_files_give_documents_or_a_clear_error(tmp_path, kind):
    sound = write_as(tmp_path, [f"text é {n} " * 5 for n in range(40)])
    data = sound[kind].read_bytes() if kind in sound else "text é\n".encode() * 100
    generator = np.random.default_rng(1)
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(int(generator.integers(1, 4))):
            at = int(generator.integers(0, len(broken)))
            match generator.integers(0, 4):
                case 0:
                    broken[at] = int(generator.integers(0, 256))
                case 1:
                    del broken[at : at + int(generator.integers(1, 50))]
                case 2:
                    broken[at:at] = generator.bytes(int(generator.integers(1, 9)))
                case _:
                    del broken[max(at, 1) :]
            broken = broken or bytearray(b"x")
        path = tmp_path / f"broken-{kind}"
        path.write_bytes(broken)
        try:
            for document in read_all(path, size=500):
                assert isinstance(document, str)
                document.encode()
        except UserError as error:
            message = str(error)
        else:
            continue
        assert message.startswith(f"{path}: ")
        assert "\n" not in message


NESTED = [
    ({"a": {"b": "deep"}}, "a.b", "deep"),
    ({"a.b": "flat", "a": {"b": "deep"}}, "a.b", "flat"),
    ({"a": {"b": {"c": "deeper"}}}, "a.b.c", "deeper"),
    ({"a.b": {"c": "half"}}, "a.b.c", "half"),
    ({"a": {"b.c": "half"}}, "a.b.c", "half"),
]


@pytest.mark.parametrize(("record", "key", "text"), NESTED)
def test_a_key_within_a_key_is_read(tmp_path, record, key, text):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", pyarrow.Table.from_pylist([record]).schema) as file:
        file.write_table(pyarrow.Table.from_pylist([record]))
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        assert read_all(tmp_path / name, Extract((key,))) == [text]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"a": {"bb": "x"}}, "no key 'a.b'; did you mean 'bb'?"),
        ({"a": "x"}, "no key 'a.b'; allowed: a"),
        ({"a": {"b": 3}}, "key 'a.b' holds a JSON int"),
        ({"a": None}, "no key 'a.b'"),
    ],
)
def test_a_key_within_a_key_that_is_not_there_is_named(tmp_path, record, reason):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    (found,) = read_all(tmp_path / "a.jsonl", Extract(("a.b",)))
    assert str(found).startswith(f":1: byte 0: {reason}")


TURNS = [{"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("record", "key", "found"),
    [
        ({"talk": TURNS, "system": "s"}, "talk", {"messages": TURNS, "system": "s"}),
        ({"talk": TURNS, "messages": TURNS}, "talk", {"messages": TURNS, "other messages": TURNS}),
        ({"a": {"talk": TURNS, "n": 1}, "id": 2}, "a.talk", {"messages": TURNS, "a.n": 1, "id": 2}),
        ({"talk": {"messages": TURNS}, "id": 2}, "talk", {"messages": TURNS, "id": 2}),
        ({"talk": "hello", "id": 2}, "talk", "hello"),
    ],
)
def test_what_stands_beside_a_conversation_comes_with_it(tmp_path, record, key, found):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read_all(tmp_path / name, Extract((key,), structured=True)) == [found]


def test_an_object_over_several_lines_is_told_how_to_be_written(tmp_path):
    (tmp_path / "a.json").write_text('{\n"text": "a"\n}\n')
    found = read_all(tmp_path / "a.json")[0]
    assert "and all of it; to write an object in several lines, put all of them into one JSON array" in str(found)
