import gzip
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megalite.data.preprocess import inputs
from megalite.data.preprocess.inputs import Segment, find_inputs, segments, shards
from megalite.errors import UserError


def test_folders_are_read_in_the_order_of_names(tmp_path):
    for name in (
        "b.jsonl",
        "a/z.txt",
        "a/y.jsonl.gz",
        "a/c.parquet",
        "d.arrow",
        ".hidden/x.txt",
        "README.md",
        "i.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(path.relative_to(tmp_path)) for path in find_inputs([tmp_path])] == [
        "a/c.parquet",
        "a/y.jsonl.gz",
        "a/z.txt",
        "b.jsonl",
        "d.arrow",
    ]


def test_files_are_taken_in_the_order_given_and_patterns_in_that_of_names(tmp_path):
    for name in ("c.jsonl", "part-2.jsonl", "part-1.jsonl", "loose.json", "deep/part-3.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    given = [tmp_path / "part-*.jsonl", tmp_path / "loose.json", tmp_path / "c.jsonl", tmp_path / "**" / "part-3.*"]
    assert [path.name for path in find_inputs(given)] == [
        "part-1.jsonl",
        "part-2.jsonl",
        "loose.json",
        "c.jsonl",
        "part-3.jsonl",
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.bz2", "a.txt.xz"])
def test_formats_that_are_not_read_are_refused_also_inside_folders(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b"")
    for given_path in (tmp_path, tmp_path / name, tmp_path / "a.*"):
        with pytest.raises(UserError, match=rf"{name}: this format is not read; allowed: \.jsonl, \.jsonl\.gz, "):
            find_inputs([given_path])


def test_what_does_not_exist_is_named_with_the_nearest(tmp_path):
    (tmp_path / "corpus.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"corpsu\.jsonl: no such file or folder; did you mean 'corpus\.jsonl'"):
        find_inputs([tmp_path / "corpsu.jsonl"])
    with pytest.raises(UserError, match="no such file or folder"):
        find_inputs([tmp_path / "no" / "where.jsonl"])
    with pytest.raises(UserError, match="no such file or folder$"):
        find_inputs([tmp_path / "elsewhere"])
    with pytest.raises(UserError, match=r"none-\*\.jsonl: no such file or folder"):
        find_inputs([tmp_path / "none-*.jsonl"])


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no text"):
        find_inputs([tmp_path])


def cut(path, size=64, *, split_lines=True) -> list[Segment]:
    return list(segments(path, size, split_lines=split_lines))


LINES = b"".join(b"x" * (n % 17) + b"\n" for n in range(200)) + b"no end"


def test_a_file_of_lines_is_cut_at_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    found = cut(tmp_path / "a.jsonl")
    assert [segment.start for segment in found] == list(range(0, len(LINES), 64))
    assert [segment.stop for segment in found[:-1]] == [segment.start for segment in found[1:]]
    assert sum(segment.disk_bytes for segment in found) == found[-1].stop == len(LINES)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_compressed_file_is_unpacked_into_whole_lines(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    # Two members, as tools write them that work in parallel.
    path.write_bytes(pack(LINES[:1000]) + pack(LINES[1000:]))
    found = cut(path)
    assert len(found) > 10
    assert b"".join(segment.data or b"" for segment in found) == LINES
    assert all(segment.data and segment.data.endswith(b"\n") for segment in found[:-1])
    assert [segment.rows_before for segment in found] == [LINES[: s.start].count(b"\n") for s in found]
    assert sum(segment.disk_bytes for segment in found) == path.stat().st_size


def test_a_line_without_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"a\n" + b"x" * 5000 + b"\nlast\n"))
    found = cut(path)
    assert max(len(segment.data or b"") for segment in found) <= 64 + 101
    assert (found[-1].data, found[-1].start, found[-1].rows_before) == (b"last\n", 5003, 2)


def test_tables_are_cut_by_group(tmp_path):
    table = pyarrow.table({"text": [f"document {n} " * 20 for n in range(100)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10, compression="none")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=10)
    for name in ("a.parquet", "a.arrow"):
        found = cut(tmp_path / name, (tmp_path / name).stat().st_size // 4)
        assert 4 <= len(found) <= 6
        assert [segment.rows_before for segment in found] == [10 * segment.start for segment in found]
        assert [segment.stop for segment in found[:-1]] == [segment.start for segment in found[1:]]
        assert (found[0].start, found[-1].stop) == (0, 10)


def test_small_files_share_a_shard_and_the_order_stays(tmp_path):
    files = []
    for number in range(20):
        files.append(tmp_path / f"{number:02d}.txt")
        files[-1].write_bytes(b"x" * 30)
    found = list(shards(files, split_lines=False, shard_bytes=100))
    assert [len(shard) for shard in found] == [3] * 6 + [2]
    assert [segment.path for shard in found for segment in shard] == files


def test_shards_grow_with_the_input_within_bounds():
    assert inputs.shard_bytes_for(1) == 1 << 20
    assert inputs.shard_bytes_for(1 << 30) == 1 << 22
    assert inputs.shard_bytes_for(1 << 50) == 1 << 26


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_broken_compressed_file_is_named(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    whole = pack(b'{"text": "a"}\n' * 1000 + os.urandom(2000))
    for data in (whole[:-600], whole[:5], b"not packed at all"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}: cannot be read"):
            cut(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_broken_table_is_named(tmp_path, name):
    for data in (b"", b"PAR1", b"ARROW1", os.urandom(500)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}: cannot be read"):
            cut(tmp_path / name)
