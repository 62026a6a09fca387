"""The files of a Hugging Face folder: which there are, and boxes of the tensors in them. No pickle is opened."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megalite.checkpoint.boxes import Box
from megalite.checkpoint.safetensors_file import SafetensorsFile
from megalite.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def inside(folder: Path, name: str) -> Path:
    """Return the path of a folder's file; raise UserError where there is none, or where it lies elsewhere.

    A link is followed within the folder, and where Hugging Face's cache has it lead: out of ``snapshots/REVISION`` to
    the ``blobs`` beside ``snapshots``.
    """
    path = folder / name
    if Path(name).name != name or name in ("", "..") or "\\" in name:
        raise UserError(f"{folder}: names the file {name!r}; a model's files lie in its own folder")
    if not path.is_file():
        raise UserError(f"{folder}: has no {name}; give a folder with all files of a model")
    home, target = folder.resolve(), path.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if target.parent not in homes:
        raise UserError(f"{path}: is a link to {target}, outside the folder; put the file itself there")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise UserError where it holds none."""
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; fetch the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; fetch the file again")
    return content


class TensorFiles:
    """All safetensors files of a folder, as one; tensors under the names that they have there.

    Raises UserError where there are none, or where they do not hold what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, SafetensorsFile] = {}
        self._file_of = self._find()
        self.shapes: Mapping[str, tuple[int, ...]] = {name: self._file(name).shapes[name] for name in self._file_of}
        self.dtypes: Mapping[str, str] = {name: self._file(name).dtypes[name] for name in self._file_of}

    def read(self, name: str, box: Box) -> np.ndarray:
        """Return a box of a tensor as fp32."""
        try:
            return self._file(name).read(name, box.slices)
        except (OSError, ValueError) as error:  # the latter from a file that has become shorter
            raise UserError(
                f"{self._folder / self._file_of[name]}: {name} cannot be read: {error}; fetch the file again"
            ) from error

    def _find(self) -> dict[str, str]:
        """Return which file each tensor is in."""
        if (self._folder / INDEX).exists():
            return self._indexed()
        if (self._folder / SINGLE).exists():
            return dict.fromkeys(self._open(SINGLE).shapes, SINGLE)
        pickles = sorted(path.name for path in self._folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise UserError(
                f"{self._folder}: holds its tensors as a pickle, {pickles[0]}, which is never opened, since it can run "
                "any code; fetch the safetensors of the model, or have whoever trusts the file save it as such"
            )
        raise UserError(f"{self._folder}: holds no tensors; {SINGLE} or {INDEX} is looked for")

    def _indexed(self) -> dict[str, str]:
        path = inside(self._folder, INDEX)
        found = read_json(path).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise UserError(f"{path}: has no weight_map from tensors to files; fetch the file again")
        for name, file in found.items():
            if name not in self._open(file).shapes:
                raise UserError(f"{path}: says that {file} holds {name}, which it does not; fetch both again")
        return found

    def _file(self, name: str) -> SafetensorsFile:
        return self._opened[self._file_of[name]]

    def _open(self, file: str) -> SafetensorsFile:
        from safetensors import SafetensorError

        if file not in self._opened:
            path = inside(self._folder, file)
            try:
                self._opened[file] = SafetensorsFile(path)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: is no whole safetensors file: {error}; fetch it again") from error
        return self._opened[file]
