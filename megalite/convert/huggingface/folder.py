"""The files of a Hugging Face folder: which there are, and boxes of the tensors in them."""

import codecs
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megalite.checkpoint.safetensors_file import ENCODINGS, SafetensorsFile
from megalite.convert.megatron.torch_file import read_torch_file
from megalite.errors import UserError
from megalite.parallel.regions import Region
from megalite.text_encoding import require_utf8

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
_WEIGHTS = (".safetensors", ".bin")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_WEIGHTS = (*_PICKLES, ".gguf", ".h5", ".msgpack", ".onnx", ".npz")


def inside(folder: Path, name: str) -> Path:
    """Return the path of a folder's file; raise UserError where there is none, or where it is a link that is not meant.

    Links are followed within the folder, and in Hugging Face's cache out of ``snapshots/REVISION`` to the ``blobs``
    beside ``snapshots``. To elsewhere, a shared disk say, a link leads to weights, or to a file of the same name: a
    folder from strangers cannot have any other file of this machine copied.
    """
    path = folder / name
    if Path(name).name != name or name in ("", "..") or "\\" in name:
        raise UserError(f"{folder}: names the file {name!r}; a model's files lie in its own folder")
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: is a link to {path.readlink()}, where there is no file; mend the link")
    if not path.is_file():
        raise UserError(f"{folder}: has no {name}; give a folder with all files of a model")
    home, target = folder.resolve(), path.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    own = any(target.is_relative_to(place) for place in homes)
    if not own and target.name != name and not (path.suffix in _WEIGHTS and target.suffix == path.suffix):
        raise UserError(
            f"{path}: is a link to {target}, a file of another name outside the folder; put the file itself there"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise UserError where it holds none."""
    try:
        data = path.read_bytes()
        require_utf8(path, data)
        content = orjson.loads(data.removeprefix(codecs.BOM_UTF8))
    except (OSError, orjson.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; fetch the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; fetch the file again")
    return content


class TorchFile:
    """A ``pytorch_model.bin``: a dict of tensors, mapped from the disk by torch's reader of plain tensors.

    Has what `SafetensorsFile` has. Raises UserError for a file that holds anything else.
    """

    def __init__(self, path: Path) -> None:
        content = read_torch_file(path)
        for name, value in content.items():
            if not isinstance(name, str) or type(value).__name__ not in ("Tensor", "Parameter"):
                raise UserError(
                    f"{path}: {str(name)[:60]!r} is {type(value).__name__}, no tensor; save the state dict alone"
                )
        self._tensors = content
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(one.shape) for name, one in content.items()}
        self.dtypes: Mapping[str, str] = {name: _stored_as(str(one.dtype)) for name, one in content.items()}

    def read(self, name: str, region: Region) -> np.ndarray:
        """Return a region of a tensor as fp32."""
        return self._tensors[name].detach()[region.slices].float().numpy()


def _stored_as(dtype: str) -> str:
    """Return safetensors' name of a type of torch's, where the type is read."""
    found = (one.dtype for one in ENCODINGS.values() if f"torch.{one.torch_name}" == dtype)
    return next(found, dtype)


class TensorFiles:
    """All weights of a folder, as one; tensors under the names that they have there.

    They are in safetensors, or in files of torch's that are read as plain tensors; in one file, or in several with an
    index. Raises UserError where there are none, where there are two sets of them, or where the files do not hold what
    the index says. `unread` says what the folder holds of weights and was not read, a line each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, SafetensorsFile | TorchFile] = {}
        self._file_of = self._find()
        self.shapes: Mapping[str, tuple[int, ...]] = {name: self._file(name).shapes[name] for name in self._file_of}
        self.dtypes: Mapping[str, str] = {name: self._file(name).dtypes[name] for name in self._file_of}
        self.unread = tuple(self._unread())

    def read(self, name: str, region: Region) -> np.ndarray:
        """Return a box of a tensor as fp32."""
        try:
            return self._file(name).read(name, region)
        except (OSError, ValueError) as error:  # the latter from a file that has become shorter
            raise UserError(
                f"{self._folder / self._file_of[name]}: {name} cannot be read: {error}; fetch the file again"
            ) from error

    @property
    def files(self) -> list[str]:
        """The names of the files that hold the tensors."""
        return sorted(self._opened)

    def _find(self) -> dict[str, str]:
        """Return which file each tensor is in."""
        there = [name for name in (INDEX, SINGLE, TORCH_INDEX, TORCH_SINGLE) if (self._folder / name).exists()]
        found: dict[str, str] = {}
        if there:
            found = self._indexed(there[0]) if there[0].endswith(".json") else self._whole(there[0])
        for other in there[1:]:
            if other not in found.values():
                raise UserError(
                    f"{self._folder}: holds two sets of weights, {there[0]} and {other}, and nothing says which is "
                    "meant; keep one of them there"
                )
        if there:
            return found
        pickles = sorted(path.name for path in self._folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise UserError(
                f"{self._folder}: holds {pickles[0]}, which is not read: it can run any code, and no part of a model "
                f"has that name alone; {SINGLE} or {TORCH_SINGLE} is read, or several files with their index"
            )
        raise UserError(f"{self._folder}: holds no tensors; {SINGLE} or {INDEX} is looked for")

    def _whole(self, name: str) -> dict[str, str]:
        return dict.fromkeys(self._open(name).shapes, name)

    def _indexed(self, index: str) -> dict[str, str]:
        path = inside(self._folder, index)
        found = read_json(path).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise UserError(f"{path}: has no weight_map from tensors to files; fetch the file again")
        for name, file in found.items():
            if name not in self._open(file).shapes:
                raise UserError(f"{path}: says that {file} holds {name}, which it does not; fetch both again")
        return found

    def _unread(self) -> Iterator[str]:
        for file, opened in sorted(self._opened.items()):
            left = sorted(name for name in opened.shapes if self._file_of.get(name) != file)
            if left:
                more = f" and {len(left) - 3:,} more" if len(left) > 3 else ""
                yield f"not read: {', '.join(left[:3])}{more} in {file}, which the index does not name there"
        others = sorted(
            path.name
            for path in self._folder.iterdir()
            if path.suffix in (*_WEIGHTS, *_OTHER_WEIGHTS) and path.name not in self._opened
        )
        if others:
            yield f"not read: {', '.join(others)}, which may hold weights too"

    def _file(self, name: str) -> SafetensorsFile | TorchFile:
        return self._opened[self._file_of[name]]

    def _open(self, file: str) -> SafetensorsFile | TorchFile:
        from safetensors import SafetensorError

        if file not in self._opened:
            path = inside(self._folder, file)
            try:
                self._opened[file] = TorchFile(path) if path.suffix == ".bin" else SafetensorsFile(path)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: is no whole safetensors file: {error}; fetch it again") from error
        return self._opened[file]
