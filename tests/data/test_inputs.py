import gzip
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.data.inputs import TEXT_DOCUMENT_BYTES, Malformed, chunks, documents, find_inputs, parse, read
from megalite.errors import UserError


def read_all(path, text_key="text", chunk_bytes=1 << 20):
    return [document for chunk in chunks(path, chunk_bytes) for document in parse(chunk, read(chunk), text_key)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=30), max_size=20), st.integers(1, 200), st.booleans())
def test_documents_do_not_depend_on_the_cut(tmp_path, texts, chunk_bytes, ends_with_newline):
    lines = "\n".join(json.dumps({"text": text}) for text in texts) + "\n" * ends_with_newline
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text(lines)
    packed.write_bytes(gzip.compress(lines.encode()))
    assert read_all(plain, chunk_bytes=chunk_bytes) == texts
    assert read_all(packed, chunk_bytes=chunk_bytes) == texts


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_are_whole_lines_that_cover_the_file(tmp_path, packed):
    data = b"".join(b"x" * (n % 17) + b"\n" for n in range(200)) + b"no end"
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    cut = list(chunks(path, 64))
    assert len(cut) > 10
    assert b"".join(map(read, cut)) == data
    assert all(read(chunk).endswith(b"\n") for chunk in cut[:-1])
    assert [chunk.start for chunk in cut[1:]] == [chunk.stop for chunk in cut[:-1]]
    assert sum(chunk.disk_bytes for chunk in cut) == path.stat().st_size


def test_a_text_file_becomes_documents_cut_at_blank_lines(tmp_path):
    paragraph = "word " * 1000 + "\nsecond line\n"
    text = f"{paragraph}\n \t\r\n\n" * 40
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    found = read_all(path)
    assert len(found) > 2
    assert "".join(map(str, found)) == text
    assert all(isinstance(document, str) and document.endswith("\n \t\r\n\n") for document in found)
    assert all(len(str(document)) >= TEXT_DOCUMENT_BYTES for document in found[:-1])


def test_a_short_text_file_is_one_document(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("first\n\nsecond\n\n")
    assert read_all(path) == ["first\n\nsecond\n\n"]


def test_blank_lines_and_foreign_line_ends_are_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\r\n \t\n{"text": "a"}\r\n\n{"text": "b"}')
    assert read_all(path) == ["a", "b"]


def test_an_empty_file_holds_nothing(tmp_path):
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b"")
        assert read_all(tmp_path / name) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "invalid JSON"),
        (b"{'text': 'a'}", "invalid JSON"),
        (b'{"text": "\\ud800"}', "invalid JSON"),
        (b'["text"]', "a JSON list; a line holds one JSON object"),
        (b'{"texts": "a", "id": 1}', "no key 'text'; did you mean 'texts'?"),
        (b'{"content": "a"}', "no key 'text'; allowed: content"),
        (b'{"text": null}', "key 'text' holds null; a document is a string"),
        (b'{"text": 3}', "key 'text' holds a JSON int; a document is a string"),
        (b'{"text": "abc\xff"}', "invalid UTF-8 at byte 14 of the line"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}\n')
    first, malformed, last = read_all(path)
    assert (first, last) == ("good", "also good")
    assert isinstance(malformed, Malformed)
    assert malformed.line == 3
    assert malformed.reason.startswith(reason)
    with pytest.raises(UserError, match=r"a\.jsonl:3: "):
        list(documents([path], "text"))


def test_invalid_utf8_in_text_is_named_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nth\xffree\n")
    (malformed,) = read_all(path)
    assert malformed == Malformed(3, "invalid UTF-8 at byte 3 of the line; text is UTF-8")


def test_line_numbers_count_through_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("megalite.data.inputs.chunks", lambda path: chunks(path, 64))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' * 99 + "bad\n")
    with pytest.raises(UserError, match=r"a\.jsonl:100: invalid JSON"):
        list(documents([path], "text"))


def test_folders_are_read_in_the_order_of_names(tmp_path):
    for name in ("b.jsonl", "a/z.txt", "a/y.jsonl.gz", ".hidden/x.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(path.relative_to(tmp_path)) for path in find_inputs([tmp_path])] == [
        "a/y.jsonl.gz",
        "a/z.txt",
        "b.jsonl",
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst", "a.json"])
def test_formats_that_are_not_read_are_refused_also_inside_folders(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b"")
    for given_path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{name}: this format is not read; allowed: \.jsonl, \.jsonl\.gz, \.txt"):
            find_inputs([given_path])


def test_what_does_not_exist_is_named_with_the_nearest(tmp_path):
    (tmp_path / "corpus.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"corpsu\.jsonl: no such file or folder; did you mean 'corpus\.jsonl'"):
        find_inputs([tmp_path / "corpsu.jsonl"])
    with pytest.raises(UserError, match="no such file or folder"):
        find_inputs([tmp_path / "no" / "where.jsonl"])


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no text"):
        find_inputs([tmp_path])


def test_a_broken_gzip_is_named(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000 + os.urandom(2000))
    for data in (whole[:-600], b"not gzip at all"):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read"):
            list(chunks(path))


def test_a_file_that_shrinks_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"12345\n")
    (chunk,) = chunks(path)
    path.write_bytes(b"123")
    with pytest.raises(UserError, match="ends at byte 3, was 6"):
        read(chunk)


def test_progress_ends_at_the_total(tmp_path):
    told = []
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    list(documents([tmp_path], "text", lambda done, total: told.append((done, total))))
    assert told == [(14, 28), (28, 28)]
