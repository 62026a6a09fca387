"""Read any region of any global tensor from a checkpoint, whatever layout wrote it."""

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
    """Reads one checkpoint folder. The manifest is validated when it is opened; `problems` compares the digests.

    Raises UserError if the folder is not a checkpoint, or if its manifest is invalid.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._open: dict[str, SafetensorsFile] = {}

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of `state.json`."""
        try:
            state = orjson.loads((self.folder / STATE).read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise UserError(f"{self.folder / STATE}: cannot be read: {error}; use another checkpoint") from error
        if not isinstance(state, dict):
            raise UserError(f"{self.folder / STATE}: is not a JSON object; use another checkpoint")
        return state

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        """Fill `out`, of the region's shape, with a region of a tensor.

        Raises UserError if the checkpoint lacks the tensor, or if a file does not match the manifest.
        """
        tensor = self.manifest.tensors.get(name)
        if tensor is None:
            raise UserError(f"{self.folder}: has no tensor {name}; use another checkpoint")
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
                raise ValueError(f"its shape is {self._open[file].shapes.get(key)}, not {chunk.shape}")
            return self._open[file].read(key, region)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{self.folder / file}: {key} cannot be read: {error}; use another checkpoint") from error

    def require_intact(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Raise UserError, with all problems, if files are missing or differ from the manifest's sizes or digests."""
        if found := self.problems(progress=progress):
            raise UserError(f"{self.folder}: {'; '.join(found)}; the checkpoint is damaged, use another")

    def problems(
        self,
        files: Iterable[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        *,
        digests: bool = True,
    ) -> list[str]:
        """Compare files, by default all, with the manifest's sizes and digests; return a line for each problem.

        `progress` receives the bytes done and the total. Without `digests` only the sizes are compared.
        """
        records = {name: self.manifest.files[name] for name in (self.manifest.files if files is None else files)}
        found, done, total = [], 0, sum(record.bytes for record in records.values())
        for name, record in records.items():
            path = self.folder / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != record.bytes:
                found.append(f"{name} has {path.stat().st_size:,} bytes, not {record.bytes:,}")
            elif digests and file_record(path) != record:
                found.append(f"{name} has another SHA-256 than the manifest says")
            done += record.bytes
            if progress:
                progress(done, total)
        return found
