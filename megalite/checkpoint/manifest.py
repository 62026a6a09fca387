"""What a checkpoint says of itself: ``manifest.json``, read with suspicion.

A tensor is known by its global name and is cut into chunks, boxes that cover it without overlap, wherever they lie.
Nothing here tells of the ranks that wrote it, but for `layout`, which is for people.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megalite.checkpoint.boxes import Box
from megalite.checkpoint.safetensors_file import FileRecord
from megalite.errors import UserError

FORMAT = "megalite checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What is stored of a parameter: a tensor is named ``KIND/NAME``."""
MOMENTS = KINDS[1:]
"""Adam's, under the optimizer's names."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One box of a global tensor: the array `key` of the safetensors file `file`."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The box within the global tensor."""
        return Box(self.offset, self.shape)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A global tensor; `dtype` is safetensors' name for it."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a checkpoint holds."""

    step: int
    tensors: dict[str, StoredTensor]
    files: dict[str, FileRecord]
    versions: dict[str, str] = field(default_factory=dict)
    """Of megalite, torch and deepspeed."""
    layout: str = ""
    """Of the ranks that wrote it; for people."""
    model: dict[str, Any] = field(default_factory=dict)
    """The run file's section `model`."""
    precision: str = "fp32"
    """In which the model was trained or stored: fp32, bf16 or fp16. The tensors are fp32 in any case."""
    config_sha256: str | None = None
    tokenizer_sha256: str | None = None
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check a checkpoint's manifest; the files it names are not looked at.

        Raises UserError where there is none, where it is not one, or where it names a file outside its folder or
        chunks that do not make up their tensors.
        """
        path = folder / MANIFEST
        try:
            manifest = TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{folder}: no checkpoint, it has no {MANIFEST}; give a folder step_N") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(f"{path}: {where}: {first['msg']}; the checkpoint is broken, use another") from error
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        if (self.format, self.version) != (FORMAT, VERSION):
            raise UserError(f"{path}: {self.format!r} version {self.version}; {FORMAT!r} version {VERSION} is read")
        for name in self.files:
            leaves = PurePosixPath(name).name != name or name in ("", "..") or "\\" in name
            if leaves or (path.parent / name).is_symlink():
                raise UserError(f"{path}: names the file {name!r}; a checkpoint's files lie in its own folder")
        for name, tensor in self.tensors.items():
            _check_tensor(path, name, tensor, self.files)


def _check_tensor(path: Path, name: str, tensor: StoredTensor, files: dict[str, FileRecord]) -> None:
    whole = Box((0,) * len(tensor.shape), tensor.shape)
    covered = 0
    for chunk in tensor.chunks:
        if chunk.file not in files:
            raise UserError(f"{path}: {name} lies in {chunk.file!r}, a file that is not listed; use another checkpoint")
        same_rank = len(chunk.offset) == len(chunk.shape) == len(tensor.shape)
        if not same_rank or min(chunk.shape, default=1) < 1 or chunk.box.intersect(whole) != chunk.box:
            raise UserError(f"{path}: {name} of {tensor.shape} has a chunk {chunk.shape} at {chunk.offset}, outside it")
        covered += chunk.box.numel
    if covered != whole.numel:
        raise UserError(f"{path}: the chunks of {name} hold {covered} of its {whole.numel} elements; use another")
