"""Columns of text in tables: parquet by row group, arrow (IPC files and streams) by record batch, bounded batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalite.errors import UserError, nearest

FORMS = ("parquet", "arrow")
_BATCH_BYTES = 1 << 20
_MOST_ROWS = 1 << 12


class BrokenTable(Exception):
    """A table that pyarrow cannot read."""


def cut(path: Path, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield stretches of about `size` bytes as (first group, last + 1, bytes on the disk, rows before)."""
    with _broken_named():
        groups = _parquet_groups(path) if path.name.endswith(".parquet") else _arrow_groups(path)
        scale = path.stat().st_size / (sum(taken for _, taken in groups) or 1)
        start = held = before = rows = 0
        for group, (count, taken) in enumerate(groups):
            if group > start and held + taken > size / scale:
                yield start, group, int(held * scale), before
                start, held, before = group, 0, rows
            rows += count
            held += taken
        if groups:
            yield start, len(groups), int(held * scale), before


def rows(
    path: Path, start: int, stop: int, keys: Sequence[str], *, whole: bool = False
) -> Iterator[dict[str, list[Any]]]:
    """Yield batches of rows as a list of values for the column of each key; without keys, or `whole`, for all columns.

    The column of a key ``a.b`` is ``a`` where there is none of the whole name. Text comes as bytes, which need not be
    UTF-8.

    Raises UserError for a column that is missing, BrokenTable for a file that cannot be read.
    """
    with _broken_named():
        batches = _parquet_batches if path.name.endswith(".parquet") else _arrow_batches
        for batch in batches(path, start, stop, keys, whole):
            names = list(dict.fromkeys(batch.schema.names))
            wanted = names if whole or not keys else _columns(path, names, keys)
            yield {name: _values(batch.column(name)) for name in wanted}


@contextmanager
def _broken_named() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise BrokenTable(str(error) or type(error).__name__) from error


def _parquet(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)


def _parquet_groups(path: Path) -> list[tuple[int, int]]:
    with _parquet(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        return [(group.num_rows, max(group.total_byte_size, 1)) for group in groups]


def _parquet_batches(path: Path, start: int, stop: int, keys: Sequence[str], whole: bool) -> Iterator[Any]:
    with _parquet(path) as file:
        found = _columns(path, file.schema_arrow.names, keys)
        columns = None if whole or not found else found
        for number in range(start, stop):
            group = file.metadata.row_group(number)
            count = min(max(_BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1), 1), _MOST_ROWS)
            yield from file.iter_batches(count, row_groups=[number], columns=columns, use_threads=False)


def _arrow_groups(path: Path) -> list[tuple[int, int]]:
    return [(batch.num_rows, max(batch.nbytes, 1)) for batch in _record_batches(path)]


def _arrow_batches(path: Path, start: int, stop: int, keys: Sequence[str], whole: bool) -> Iterator[Any]:
    for batch in _record_batches(path, start, stop):
        _columns(path, batch.schema.names, keys)
        count = min(max(_BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1), 1), _MOST_ROWS)
        for at in range(0, batch.num_rows, count):
            yield batch.slice(at, count)


def _record_batches(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            with pyarrow.ipc.open_file(source) as file:
                end = file.num_record_batches if stop is None else stop
                yield from (file.get_batch(number) for number in range(start, end))
            return
        source.seek(0)
        with pyarrow.ipc.open_stream(source) as stream:
            for number, batch in enumerate(stream):
                if stop is not None and number >= stop:
                    return
                if number >= start:
                    yield batch


def _values(column: Any) -> list[Any]:
    import pyarrow

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    # As bytes, so that one document that is no UTF-8 is one document and not the batch.
    if pyarrow.types.is_string(kind):
        column = column.view(pyarrow.binary())
    elif pyarrow.types.is_large_string(kind):
        column = column.view(pyarrow.large_binary())
    elif pyarrow.types.is_string_view(kind):
        column = column.view(pyarrow.binary_view())
    # What an arrow file says of itself is believed by nobody: a wrong offset would be read from anywhere.
    column.validate(full=True)
    return column.to_pylist()


def _columns(path: Path, names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the column in which each key stands, each once; raise UserError where there is none, or two."""
    found = []
    for key in keys:
        parts = key.split(".")
        heads = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        column = next((head for head in heads if head in names), None)
        if column is None:
            raise UserError(f"{path}: no column {key!r}{nearest(key, names)}; say which with --text-key")
        if list(names).count(column) > 1:
            raise UserError(
                f"{path}: {list(names).count(column)} columns are named {column!r}; one is allowed; rename them"
            )
        found.append(column)
    return list(dict.fromkeys(found))
