"""A model's weights from one place into another, one tensor in memory at a time.

What is written grows under a temporary name in the same folder. It gets its own name when it is whole, and where a
caller looks at it first, when that has not objected.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np

from megalite.checkpoint import store
from megalite.checkpoint.manifest import Manifest
from megalite.checkpoint.model_files import tokenizer_name
from megalite.checkpoint.safetensors_file import ENCODINGS
from megalite.checkpoint.store import Part
from megalite.checkpoint.weights import WEIGHT, document_tokens
from megalite.config import ModelConfig
from megalite.convert.generation_config import generation_settings, model_file_contents
from megalite.convert.huggingface.tokenizer_files import tokenizer_files
from megalite.convert.huggingface.writer import write_folder
from megalite.errors import UserError
from megalite.files import partial_path, publish, require_writable_folder
from megalite.model.weights import Weights
from megalite.parallel.regions import Region

FILE_BYTES = 4 << 30
"""The most that a file of a checkpoint holds, unless a tensor is larger."""
_SLACK_BYTES = 1 << 20

Progress = Callable[[int, int], None]


@contextmanager
def growing(output: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield the temporary name of a folder that the body makes; publish it when that ends, remove it if it fails.

    Raises UserError where `output` exists, where it cannot be, and where the disk has less room than is needed.
    """
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists, and is not overwritten; give another OUTPUT, or remove it")
    require_writable_folder(output.parent, str(output), "give another OUTPUT")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < needed_bytes + _SLACK_BYTES:
        raise UserError(f"{output}: needs {needed_bytes:,} bytes, and {free:,} are free there; give another OUTPUT")
    unfinished = partial_path(output)
    try:
        yield unfinished
        publish(unfinished, output)
    finally:
        for left in (unfinished, store.temporary_folder(unfinished)):
            shutil.rmtree(left, ignore_errors=True)


def size_of(weights: Weights, precision: str) -> int:
    """Return how many bytes the weights take in a precision."""
    return sum(map(prod, weights.shapes.values())) * ENCODINGS[precision].itemsize


def to_checkpoint(weights: Weights, model_files: Mapping[str, Path], folder: Path, progress: Progress) -> None:
    """Write a checkpoint of weights alone, at step 0; `progress` is told the bytes done and in all."""
    total, done = size_of(weights, "fp32"), 0

    def load(name: str, shape: tuple[int, ...]) -> np.ndarray:
        nonlocal done
        array = np.empty(shape, np.float32)
        weights.read(name, Region.whole(shape), array)
        done += array.nbytes
        progress(done, total)
        return array

    store.begin(folder)
    files = list(_files(weights.shapes))
    for number, names in enumerate(files):
        shapes = ((name, weights.shapes[name]) for name in names)
        parts = [Part(WEIGHT + name, shape, Region.whole(shape), partial(load, name, shape)) for name, shape in shapes]
        store.write_rank(folder, number, parts)
    small = model_file_contents(weights, model_files)
    tokenizer = tokenizer_name(small)
    manifest = Manifest(
        0,
        {},
        {},
        versions={"megalite": version("megalite")},
        model=weights.model.model_dump(mode="json"),
        precision=weights.precision,
        tokenizer_sha256=None if tokenizer is None else sha256(small[tokenizer]).hexdigest(),
        documents=document_tokens(weights),
    )
    store.finish(folder, ranks=len(files), manifest=manifest, state={"step": 0}, files=small)


def to_hugging_face(
    weights: Weights,
    model_files: Mapping[str, Path],
    folder: Path,
    progress: Progress,
    *,
    precision: str,
    max_shard_bytes: int,
) -> None:
    """Write a Hugging Face folder; `progress` is told the bytes done and in all.

    Raises UserError for a model or a tokenizer that has no equal there.
    """
    assert weights.model.vocab_size is not None
    settings, where = generation_settings(weights, model_files)
    tokenizer = tokenizer_files(
        model_files, weights.model.vocab_size, settings=settings, where=where, documents=document_tokens(weights)
    )
    folder.mkdir()
    write_folder(
        weights, folder, precision=precision, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes, progress=progress
    )


def _files(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Share tensors out over files."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 4 * prod(shape) > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 4 * prod(shape)
    yield names


@dataclass(frozen=True, slots=True)
class RoundedWeights:
    """Weights as they are once written in `precision`; satisfies `Weights`."""

    weights: Weights
    precision: str

    @property
    def origin(self) -> Path:
        return self.weights.origin

    @property
    def model(self) -> ModelConfig:
        return self.weights.model

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.weights.shapes

    @property
    def model_files(self) -> Mapping[str, Path]:
        return self.weights.model_files

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        self.weights.read(name, region, out)
        encoding = ENCODINGS[self.precision]
        out[...] = encoding.decode(encoding.encode(np.ascontiguousarray(out)))
