"""Boxes of global tensors out of a checkpoint, whatever ranks wrote it: each reader takes just what it needs."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megalite.checkpoint.boxes import Box
from megalite.checkpoint.manifest import STATE, Manifest
from megalite.checkpoint.safetensors_file import SafetensorsFile, file_record
from megalite.errors import UserError


class CheckpointReader:
    """One checkpoint folder; the manifest is checked when it is opened, digests only by `verify`.

    Raises UserError where it is none, or names what lies elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._open: dict[str, SafetensorsFile] = {}

    @cached_property
    def state(self) -> dict[str, Any]:
        """What `state.json` holds."""
        try:
            return orjson.loads((self.folder / STATE).read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise UserError(f"{self.folder / STATE}: cannot be read: {error}; use another checkpoint") from error

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        """Fill `out`, of the box's shape, with a box of a tensor.

        Raises UserError where the checkpoint lacks the tensor, or a file of it does not hold what the manifest says.
        """
        tensor = self.manifest.tensors.get(name)
        if tensor is None:
            raise UserError(f"{self.folder}: holds no tensor {name}")
        filled = 0
        for chunk in tensor.chunks:
            common = chunk.box.intersect(box)
            if common is not None:
                part = self._slice(chunk.file, chunk.key, common.relative_to(chunk.offset))
                out[common.relative_to(box.offset).slices] = part
                filled += common.numel
        if filled != box.numel:  # chunks that overlap leave a hole somewhere
            raise UserError(
                f"{self.folder}: {box.numel - filled} elements of {name} lie in no chunk; use another checkpoint"
            )

    def _slice(self, file: str, key: str, box: Box) -> np.ndarray:
        from safetensors import SafetensorError

        try:
            if file not in self._open:
                self._open[file] = SafetensorsFile(self.folder / file)
            return self._open[file].read(key, box.slices)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{self.folder / file}: {key} cannot be read: {error}; use another checkpoint") from error

    def faults(self, files: Iterable[str] | None = None, progress: Callable[[int], None] | None = None) -> list[str]:
        """Compare files, by default all, with the manifest's sizes and digests; return what is wrong, a line each."""
        found = []
        for name in self.manifest.files if files is None else files:
            told, path = self.manifest.files[name], self.folder / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != told.bytes:
                found.append(f"{name} has {path.stat().st_size:,} bytes, not {told.bytes:,}")
            elif file_record(path) != told:
                found.append(f"{name} has another SHA-256 than the manifest says")
            if progress:
                progress(told.bytes)
        return found


def checkpoints(root: Path) -> Sequence[tuple[int, Path]]:
    """Return the steps and folders of a run's checkpoints, the newest first."""
    found = []
    for path in root.glob("step_*") if root.is_dir() else ():
        number = path.name.removeprefix("step_")
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    return sorted(found, reverse=True)
