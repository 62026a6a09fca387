"""JSON arrays in place of lines: every element a document, in its place, however the file is cut."""

import gzip
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.preprocess import json_arrays
from megalite.data.preprocess.inputs import shards
from megalite.data.preprocess.readers import Extract, read
from megalite.data.preprocess.source_location import Locator
from megalite.errors import UserError

TEXT = st.text(alphabet='ab"\\[]{},:\n\r\t é漢😀/', max_size=12)
VALUES = st.recursive(
    TEXT | st.integers(-9, 9) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def read_all(path: Path, size: int = 1 << 20, extract: Extract | None = None) -> list[Any]:
    """Documents, and what is told of malformed ones."""
    extract = extract or Extract()
    found: list[tuple[int, Any]] = []
    for shard in shards([path], split_lines=False, shard_bytes=size):
        for segment in shard:
            for batch in read(segment, extract):
                places = list(batch.places)
                found += [
                    (segment.rows_before + place.number, document)
                    for place, document in zip(places, batch.documents, strict=True)
                ]
                found += [
                    (segment.rows_before + malformed.place.number, Locator().describe(segment, malformed))
                    for malformed in batch.malformed
                ]
    return [document for _, document in sorted(found, key=lambda item: item[0])]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(TEXT, VALUES), max_size=6),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 30),
    st.sampled_from(["", "\ufeff", " \n\t"]),
)
def test_elements_are_the_documents_wherever_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    items: list[Any],
    indent: Any,
    ascii: bool,
    block: int,
    size: int,
    head: str,
) -> None:
    records = [{"other": other, "text": f"x{text}"} for text, other in items]
    path = tmp_path_factory.getbasetemp() / "array.json"
    text = head + json.dumps(records, indent=indent, ensure_ascii=ascii) + "\n "
    if indent is None and len(items) == 1:
        text = text.replace("\n ", "")
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_arrays, "_BLOCK_BYTES", block)
        assert read_all(path, size) == [record["text"] for record in records]
        assert read_all(path, size, Extract((), structured=True)) == records


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.json.gz"])
@pytest.mark.parametrize("text", ['[{"text": "a"}, {"text": "b"}]', '\n\n[\n{"text": "a"\n},\n{"text": "b"}\n]\n\n'])
def test_arrays_are_read_under_every_name_of_lines(tmp_path: Path, name: str, text: str) -> None:
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_all(tmp_path / name) == ["a", "b"]
    (tmp_path / name).write_bytes(gzip.compress(b"[ ]\n") if name.endswith(".gz") else b"[ ]\n")
    assert read_all(tmp_path / name) == []


def test_lines_of_which_the_first_is_an_array_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('["a"]\n{"text": "b"}\n')
    first, second = read_all(path)
    assert first == f"{path}:1: byte 0: a JSON list; a line holds one JSON object"
    assert second == "b"


BAD_ELEMENTS = [
    ('{"text": 3}', 0, "key 'text' holds a JSON int; a document is a string"),
    ('"text"', 0, "a JSON str; an element is one JSON object"),
    ('{"text" "a"}', 8, "invalid JSON"),
    ('{"text": "a\nb"}', 11, "invalid JSON"),
    ('{"text": NaN}', 9, "invalid JSON"),
    ('{"text": "\\ud800"}', 9, "invalid JSON"),
]


@pytest.mark.parametrize(("element", "byte", "reason"), BAD_ELEMENTS)
@pytest.mark.parametrize("size", [1, 30, 1 << 20])
def test_a_malformed_element_is_named_by_number_and_byte(
    tmp_path: Path, element: str, byte: int, reason: str, size: int
) -> None:
    path = tmp_path / "a.json"
    head = '\ufeff[{"text":\n"é"},{"text": "b"},'.encode()
    path.write_bytes(head + element.encode() + b',\n{"text": "c"}]')
    first, second, malformed, last = read_all(path, size)
    assert (first, second, last) == ("é", "b", "c")
    place = len(head) + byte
    where = [f"{path}: element 3: byte {at}: {reason}" for at in (place, place + 1)]  # orjson's choice
    assert malformed.startswith(tuple(where))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"},', "byte 15: the JSON array is cut short in element 2: the file ends here"),
        ('[{"text": "a', "byte 12: the JSON array is cut short in element 1"),
        ("[", "byte 1: the JSON array is cut short in element 1"),
        ('[{"text": "a"},\n]', "byte 16: the JSON array has an element that is empty before this"),
        ('[,{"text": "a"}]', "byte 1: the JSON array has an element that is empty"),
        ('[{"text": "a"},,{"text": "b"}]', "byte 15: the JSON array has an element that is empty"),
        ('[\n{"text": "a"}]\n]', "byte 17: the JSON array ends, and more comes behind it"),
        ('[\n{"text": "a"}]\n{"text": "b"}', "byte 17: the JSON array ends, and more comes behind it"),
        ('[{"text": "a"]}', "byte 14: the JSON array is closed by '}'"),
    ],
)
@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_a_broken_array_is_named_by_its_byte(
    tmp_path: Path, text: str, message: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_arrays, "_BLOCK_BYTES", block)
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_all(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("element", ['{"text": "' + "x" * 300 + '"}', "[" * 300, " " * 300 + "1"])
def test_an_element_beyond_the_limit_is_refused(tmp_path: Path, element: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_arrays, "_BLOCK_BYTES", 10)
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n' + element + "]")
    with path.open("rb") as file, pytest.raises(UserError, match=r"byte 15: .* an element of more than 99 bytes"):
        list(json_arrays.elements(file, path, 1 << 20, 99))  # pyright: ignore[reportArgumentType] (a raw file reads as well)


def test_a_large_array_is_held_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_arrays, "_BLOCK_BYTES", 100)
    path = tmp_path / "a.json"
    path.write_bytes(orjson.dumps([{"text": f"document {number}"} for number in range(500)]))
    with path.open("rb") as file:
        parts = list(json_arrays.elements(file, path, 200, 1 << 20))
    assert max(len(part.data) for part in parts) < 400
    assert [part.before for part in parts] == [sum(p.data.count(b"\n") for p in parts[:at]) for at in range(len(parts))]
    assert b"".join(part.data for part in parts).count(b"\n") == 500
