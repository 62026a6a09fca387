"""List, measure and compare checkpoints, reading region by region in memory independent of the model's size."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from megalite.checkpoint.discovery import find_checkpoints, unfinished_saves
from megalite.checkpoint.manifest import KINDS, MANIFEST
from megalite.checkpoint.mismatch_table import shape_mismatches
from megalite.checkpoint.reader import CheckpointReader
from megalite.errors import UserError
from megalite.parallel.regions import Region

REGION_ELEMENTS = 1 << 23
"""Elements of the largest region that is read at a time, 32 MiB of fp32."""

_MODULES = (
    *("embedding", "tokens", "positions", "layers"),
    *("attention_norm", "attention", "query", "key", "value", "query_norm", "key_norm", "output"),
    *("mlp_norm", "mlp", "gate", "up", "down", "final_norm", "head"),
)
"""Names of modules in the order of the forward pass."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ListedCheckpoint:
    """A checkpoint folder; `fault` describes damage, as far as the names and sizes of its files show it."""

    folder: Path
    step: int | None
    bytes: int
    written: datetime
    fault: str | None = None


def list_checkpoints(root: Path) -> list[ListedCheckpoint]:
    """Return the checkpoints of a folder, oldest first, then the unfinished saves."""
    listed = [_listed(step, folder) for step, folder in reversed(find_checkpoints(root))]
    return listed + [
        ListedCheckpoint(path, None, _bytes_in(path), _written(path), "unfinished: a save under way, or a killed save")
        for path in unfinished_saves(root)
    ]


def _listed(step: int, folder: Path) -> ListedCheckpoint:
    try:
        reader = CheckpointReader(folder)
    except UserError as error:
        return ListedCheckpoint(folder, step, _bytes_in(folder), _written(folder), f"broken: {error}")
    problems = reader.problems(digests=False)
    fault = f"broken: {'; '.join(problems)}" if problems else None
    return ListedCheckpoint(folder, step, size_on_disk(reader), _written(folder / MANIFEST), fault)


def size_on_disk(reader: CheckpointReader) -> int:
    """Return the size of a checkpoint's files, as its manifest lists them, and of the manifest, in bytes."""
    return sum(record.bytes for record in reader.manifest.files.values()) + (reader.folder / MANIFEST).stat().st_size


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _written(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime)


def flat_state(state: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested state: keys such as ``data.sources.0.samples``, values as text."""
    flat: dict[str, str] = {}
    for key, value in state.items():
        if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= flat_state(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def in_model_order(names: Mapping[str, Any] | set[str]) -> list[str]:
    """Sort names of tensors by the order of the forward pass: weights first, layer 2 before layer 10."""

    def key(name: str) -> tuple[Any, ...]:
        kind, _, rest = name.rpartition("/")
        words = [(int(word), "") if word.isdigit() else (_rank(_MODULES, word), word) for word in rest.split(".")]
        return _rank(KINDS, kind), kind, words

    return sorted(names, key=key)


def _rank(order: tuple[str, ...], word: str) -> int:
    return order.index(word) if word in order else len(order)


def tiles(shape: tuple[int, ...], most: int) -> Iterator[Region]:
    """Divide a tensor into regions of at most `most` elements, in row-major order.

    >>> [region.shape for region in tiles((5, 4), most=8)]
    [(2, 4), (2, 4), (1, 4)]
    >>> [region.offset for region in tiles((2, 5), most=3)]
    [(0, 0), (0, 3), (1, 0), (1, 3)]
    """
    edges, room = list(shape), max(1, most)
    for dim, length in reversed(list(enumerate(shape))):
        edges[dim] = max(1, min(length, room))
        room = max(1, room // max(1, length))
    starts = [range(0, length, edge) for length, edge in zip(shape, edges, strict=True)]
    for offset in product(*starts):
        yield Region(offset, tuple(map(min, edges, (length - at for length, at in zip(shape, offset, strict=True)))))


@dataclass(frozen=True, slots=True)
class TensorNorms:
    """The L2 norms of a global tensor's weight and of each of Adam's moments, by kind."""

    name: str
    shape: tuple[int, ...]
    norms: dict[str, float]


def kinds(reader: CheckpointReader) -> list[str]:
    """Return the kinds of tensors in a checkpoint: ``weight``, ``exp_avg``, ``exp_avg_sq``."""
    found = {name.rpartition("/")[0] for name in reader.manifest.tensors}
    return sorted(found, key=lambda kind: (_rank(KINDS, kind), kind))


def norms(reader: CheckpointReader, progress: Progress) -> Iterator[TensorNorms]:
    """Yield the norms of each tensor, computed in fp64; `progress` receives the bytes read and the total."""
    tensors = reader.manifest.tensors
    total, done = sum(4 * prod(tensor.shape) for tensor in tensors.values()), 0
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in in_model_order(tensors):
        together.setdefault((name.rpartition("/")[2], tensors[name].shape), []).append(name)
    for (bare, shape), names in together.items():
        found: dict[str, float] = {}
        for name in names:
            squares = 0.0
            for region in tiles(shape, REGION_ELEMENTS):
                squares += _squares(_read(reader, name, region))
                done += 4 * region.numel
                progress(done, total)
            found[name.rpartition("/")[0]] = squares**0.5
        yield TensorNorms(bare, shape, found)


def _read(reader: CheckpointReader, name: str, region: Region) -> np.ndarray:
    out = np.empty(region.shape, np.float32)
    reader.read(name, region, out)
    return out


def _squares(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())


@dataclass(slots=True)
class TensorDifference:
    """The differences of a tensor between A and B: how many elements differ, the largest difference, its index and
    values.

    `relative` is the norm of the difference divided by the norm of A's tensor.
    """

    name: str
    elements: int
    differing: int = 0
    largest: float = 0.0
    index: tuple[int, ...] = ()
    values: tuple[float, float] = (0.0, 0.0)
    relative: float = 0.0


@dataclass(slots=True)
class Comparison:
    """The differences between two checkpoints.

    Rows are (name, in A, in B); `counts` has the numbers of equal and of different tensors of each kind.
    """

    shapes: list[tuple[str, str, str]]
    state: list[tuple[str, str, str]]
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    first: TensorDifference | None = None
    worst: TensorDifference | None = None

    @property
    def equal(self) -> bool:
        """Whether both checkpoints hold the same tensors and state, bit by bit."""
        return not (self.shapes or self.state or self.first)


def compare(a: CheckpointReader, b: CheckpointReader, progress: Progress) -> Comparison:
    """Compare the tensors and the state of two checkpoints bit by bit, independent of how their files divide them.

    `progress` receives the bytes compared and the total.
    """
    in_a, in_b = ({name: tensor.shape for name, tensor in reader.manifest.tensors.items()} for reader in (a, b))
    state_a, state_b = _state_of(a), _state_of(b)
    changed = [
        key
        for key in [*state_a, *(key for key in state_b if key not in state_a)]
        if state_a.get(key) != state_b.get(key)
    ]
    state = [(key, state_a.get(key, "missing"), state_b.get(key, "missing")) for key in changed]
    comparison = Comparison(shape_mismatches(in_a, in_b), state)
    both = in_model_order({name for name in in_a if in_a[name] == in_b.get(name)})
    total, done = sum(4 * prod(in_a[name]) for name in both), 0
    for name in both:
        found = _difference(a, b, name, in_a[name], lambda count, before=done: progress(before + count, total))
        done += 4 * found.elements
        kind, is_other = name.rpartition("/")[0], bool(found.differing)
        equal, different = comparison.counts.get(kind, (0, 0))
        comparison.counts[kind] = (equal + (not is_other), different + is_other)
        if is_other:
            comparison.first = comparison.first or found
            if comparison.worst is None or found.relative > comparison.worst.relative:
                comparison.worst = found
    return comparison


def _state_of(reader: CheckpointReader) -> dict[str, str]:
    """Return everything in a checkpoint beside the tensors, except the layout and the versions that wrote it."""
    manifest = reader.manifest
    described = {"precision": manifest.precision, "tokenizer_sha256": manifest.tokenizer_sha256}
    return flat_state(reader.state) | flat_state({"model": manifest.model, **described})


def _difference(
    a: CheckpointReader, b: CheckpointReader, name: str, shape: tuple[int, ...], progress: Callable[[int], None]
) -> TensorDifference:
    found = TensorDifference(name, prod(shape))
    squares_of_difference = squares = 0.0
    done = 0
    for region in tiles(shape, REGION_ELEMENTS):
        values_a, values_b = _read(a, name, region), _read(b, name, region)
        squares += _squares(values_a)
        other = values_a.view(np.uint32) != values_b.view(np.uint32)
        if other.any():
            with np.errstate(invalid="ignore"):
                apart = np.abs(values_a[other].astype(np.float64) - values_b[other])
            apart[np.isnan(apart)] = np.inf  # a NaN in only one of them, or infinities
            squares_of_difference += float(np.square(apart).sum())
            worst = int(apart.argmax())
            if not found.differing or apart[worst] > found.largest:
                inside = tuple(map(int, np.unravel_index(np.flatnonzero(other)[worst], other.shape)))
                found.largest = float(apart[worst])
                found.index = tuple(start + at for start, at in zip(region.offset, inside, strict=True))
                found.values = float(values_a[inside]), float(values_b[inside])
            found.differing += int(other.sum())
        done += 4 * region.numel
        progress(done)
    found.relative = (squares_of_difference / squares) ** 0.5 if squares else np.inf if squares_of_difference else 0.0
    return found
