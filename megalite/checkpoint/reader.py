"""Boxes of global tensors out of a checkpoint, whatever ranks wrote it: each reader takes just what it needs."""

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megalite.checkpoint.manifest import STATE, Chunk, Manifest
from megalite.checkpoint.safetensors_file import SafetensorsFile, file_record
from megalite.errors import UserError
from megalite.parallel.regions import Region


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
            state = orjson.loads((self.folder / STATE).read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise UserError(f"{self.folder / STATE}: cannot be read: {error}; use another checkpoint") from error
        if not isinstance(state, dict):
            raise UserError(f"{self.folder / STATE}: holds no object; use another checkpoint")
        return state

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        """Fill `out`, of the box's shape, with a box of a tensor.

        Raises UserError where the checkpoint lacks the tensor, or a file of it does not hold what the manifest says.
        """
        tensor = self.manifest.tensors.get(name)
        if tensor is None:
            raise UserError(f"{self.folder}: holds no tensor {name}")
        for chunk in tensor.chunks:
            common = chunk.region.intersect(region)
            if common is not None:
                out[common.relative_to(region.offset).slices] = self._slice(chunk, common.relative_to(chunk.offset))

    def _slice(self, chunk: Chunk, region: Region) -> np.ndarray:
        from safetensors import SafetensorError

        file, key = chunk.file, chunk.key
        try:
            if file not in self._open:
                self._open[file] = SafetensorsFile(self.folder / file)
            if self._open[file].shapes.get(key) != chunk.shape:
                raise ValueError(f"it is of {self._open[file].shapes.get(key)}, not {chunk.shape}")
            return self._open[file].read(key, region)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{self.folder / file}: {key} cannot be read: {error}; use another checkpoint") from error

    def require_whole(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Raise UserError, with all that is wrong, where the files are not those of which the manifest tells."""
        if found := self.faults(progress=progress):
            raise UserError(f"{self.folder}: {'; '.join(found)}; the checkpoint is damaged, use another")

    def faults(
        self,
        files: Iterable[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        *,
        digests: bool = True,
    ) -> list[str]:
        """Compare files, by default all, with the manifest's sizes and digests; return what is wrong, a line each.

        `progress` is told the bytes done and in all. Without `digests` the sizes alone are compared.
        """
        records = {name: self.manifest.files[name] for name in (self.manifest.files if files is None else files)}
        found, done, total = [], 0, sum(record.bytes for record in records.values())
        for name, told in records.items():
            path = self.folder / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != told.bytes:
                found.append(f"{name} has {path.stat().st_size:,} bytes, not {told.bytes:,}")
            elif digests and file_record(path) != told:
                found.append(f"{name} has another SHA-256 than the manifest says")
            done += told.bytes
            if progress:
                progress(done, total)
        return found
