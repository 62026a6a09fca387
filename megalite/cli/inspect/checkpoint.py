"""What is in a checkpoint, whether its files are sound, and how it differs from another."""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megalite.checkpoint.manifest import MANIFEST
from megalite.cli.columns import table
from megalite.cli.progress import byte_progress
from megalite.errors import UserError

if TYPE_CHECKING:
    from megalite.checkpoint.inspection import Comparison, ListedCheckpoint, TensorDifference
    from megalite.checkpoint.reader import CheckpointReader

_ALL = "all"


def is_checkpoint(path: Path) -> bool:
    """Tell whether a path is one checkpoint's folder, whole or not."""
    return (path / MANIFEST).is_file() or (path.is_dir() and path.name.startswith("step_"))


def newest_checkpoint(path: Path) -> Path:
    """Return the newest checkpoint of a folder of them, or of a run's, and print which; another path as it is.

    A damaged one is taken too: its damage is what is asked about. Raises UserError where no save has ended.
    """
    from megalite.checkpoint.discovery import checkpoint_root, find_checkpoints

    root = checkpoint_root(path)
    if is_checkpoint(path) or root is None:
        return path
    newest = next((folder for _, folder in find_checkpoints(root) if (folder / MANIFEST).is_file()), None)
    if newest is None:
        raise UserError(f"{root}: holds no checkpoint that is whole; give another folder")
    typer.echo(f"{path}: the newest is {newest}")
    return newest


def list_folder(root: Path) -> None:
    """Print the checkpoints of a folder, the newest marked, and the saves that did not end."""
    from megalite.checkpoint.inspection import list_checkpoints

    listed = list_checkpoints(root)
    whole = [checkpoint for checkpoint in listed if checkpoint.fault is None]
    typer.echo(f"{root}: {len(whole)} checkpoints")
    for row in table([_row(checkpoint, bool(whole) and checkpoint is whole[-1]) for checkpoint in listed], right=(2,)):
        typer.echo(row)


def _row(checkpoint: "ListedCheckpoint", is_newest: bool) -> tuple[str, ...]:
    size, written = f"{checkpoint.bytes / 1e6:,.1f} MB", f"{checkpoint.written:%Y-%m-%d %H:%M:%S}"
    return checkpoint.folder.name, written, size, checkpoint.fault or ("newest" if is_newest else "")


def verify_checkpoint(path: Path) -> None:
    """Check every file of a checkpoint; raise UserError with a line for each that is not as it was written."""
    from megalite.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(path)
    files = reader.manifest.files
    total = sum(record.bytes for record in files.values())
    with byte_progress("verifying") as progress:
        faults = reader.problems(progress=progress)
    if faults:
        raise UserError("\n".join(f"{path}: {fault}; use another checkpoint" for fault in faults))
    typer.echo(f"{path}: all {len(files)} files, {total / 1e6:,.1f} MB, are as they were written")


def inspect_checkpoint(path: Path) -> None:
    """Print what a checkpoint says of itself, and its tensors with their shapes and norms."""
    from megalite.checkpoint.inspection import kinds, norms
    from megalite.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(path)
    for line in _head(reader):
        typer.echo(line)
    columns, tensors = kinds(reader), reader.manifest.tensors
    bare = {name.rpartition("/")[2]: tensor.shape for name, tensor in tensors.items()}
    widths = max(map(len, (*bare, _ALL))), max((len(by_x(shape)) for shape in bare.values()), default=0)

    def row(name: str, shape: str, cells: Sequence[str]) -> str:
        return f"{name:<{widths[0]}}  {shape:>{widths[1]}}" + "".join(f"  {cell:>12}" for cell in cells)

    typer.echo("\nL2 norms of the tensors")
    typer.echo(row("", "", columns))
    squares = dict.fromkeys(columns, 0.0)
    with byte_progress("taking norms") as progress:
        for tensor in norms(reader, progress):
            cells = (f"{tensor.norms[kind]:.6g}" if kind in tensor.norms else "-" for kind in columns)
            typer.echo(row(tensor.name, by_x(tensor.shape), list(cells)))
            for kind, norm in tensor.norms.items():
                squares[kind] += norm**2
    typer.echo(row(_ALL, "", [f"{squares[kind] ** 0.5:.6g}" for kind in columns]))


def _head(reader: "CheckpointReader") -> Iterator[str]:
    from megalite.checkpoint.inspection import flat_state, size_on_disk
    from megalite.checkpoint.weights import WEIGHT

    manifest = reader.manifest
    weights = [tensor.shape for name, tensor in manifest.tensors.items() if name.startswith(WEIGHT)]
    yield (
        f"{reader.folder}: step {manifest.step:,}, {sum(map(prod, weights)):,} parameters, "
        f"{len(manifest.tensors):,} tensors, {size_on_disk(reader) / 1e6:,.1f} MB"
    )
    yield f"layout at save: {manifest.layout or 'none, it was converted'}"
    yield f"precision: {manifest.precision}, stored in fp32"
    yield f"versions: {', '.join(f'{name} {number}' for name, number in manifest.versions.items()) or 'not told'}"
    model = ", ".join(f"{key} {value}" for key, value in manifest.model.items() if value is not None)
    yield f"model: {model or 'not told'}"
    yield f"tokenizer: {f'SHA-256 {manifest.tokenizer_sha256[:12]}' if manifest.tokenizer_sha256 else 'none'}"
    yield from table(
        [
            ("files:" if not n else "", name, f"{record.bytes:,}")
            for n, (name, record) in enumerate(sorted(manifest.files.items()))
        ],
        right=(2,),
    )
    yield from table([("state:" if not n else "", *pair) for n, pair in enumerate(flat_state(reader.state).items())])


def compare_checkpoints(path: Path, other: Path) -> bool:
    """Print how two checkpoints differ; return whether they are equal."""
    from megalite.checkpoint.inspection import compare
    from megalite.checkpoint.reader import CheckpointReader

    a, b = CheckpointReader(path), CheckpointReader(other)
    with byte_progress("comparing") as progress:
        comparison = compare(a, b, progress)
    for line in _comparison(comparison):
        typer.echo(line)
    return comparison.equal


def _comparison(comparison: "Comparison") -> Iterator[str]:
    from megalite.checkpoint.mismatch_table import mismatch_table

    if comparison.shapes:
        yield f"tensors of other names or shapes:\n{mismatch_table(comparison.shapes, 'in A', 'in B')}"
    if comparison.state:
        yield f"state:\n{mismatch_table(comparison.state, 'in A', 'in B')}"
    for kind, (equal, different) in comparison.counts.items():
        yield f"{kind}: {equal:,} tensors are equal bit by bit, {different:,} are not"
    if comparison.first is not None and comparison.worst is not None:
        yield f"the first that differs: {_told(comparison.first)}"
        if comparison.worst is not comparison.first:
            yield f"the one that differs most: {_told(comparison.worst)}"
    if comparison.equal:
        yield "equal"


def _told(difference: "TensorDifference") -> str:
    place, (here, there) = list(difference.index), difference.values
    return (
        f"{difference.name}: by {difference.largest:.6g} at most, at {place}, {here:.9g} in A and {there:.9g} in B; "
        f"{difference.differing:,} of {difference.elements:,} elements differ, by {difference.relative:.3g} of A's norm"
    )


def by_x(shape: Sequence[int]) -> str:
    """Return a shape as it is shown, ``2 x 3``."""
    return " x ".join(map(str, shape)) or "one number"
