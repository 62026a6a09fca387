"""What a checkpoint says of itself: ``manifest.json``, read with suspicion.

A tensor is known by its global name and is cut into chunks, boxes that cover it without overlap, wherever they lie.
Nothing here tells of the ranks that wrote it, but for `layout`, which is for people.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from megalite.checkpoint.safetensors_file import ENCODINGS, FileRecord
from megalite.checkpoint.special_tokens import DocumentTokens
from megalite.config.validation import validation_lines
from megalite.errors import UserError
from megalite.parallel.regions import Region

FORMAT = "megalite checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
PRECISIONS = tuple(ENCODINGS)
_LONGEST_NAME = 200
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
    def region(self) -> Region:
        """The box within the global tensor."""
        return Region(self.offset, self.shape)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A global tensor; `dtype` is safetensors' name for it."""

    shape: tuple[int, ...]
    dtype: Literal["F32"]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a checkpoint holds."""

    step: Annotated[int, Field(ge=0, lt=1 << 63)]
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
    documents: DocumentTokens | None = None
    """What stood around the documents of the training data; None in checkpoints that do not tell it."""
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
            told = json.loads(path.read_bytes())
            form = (told.get("format"), told.get("version")) if isinstance(told, dict) else (None, None)
            if form != (FORMAT, VERSION):
                raise UserError(f"{path}: {form[0]!r} version {form[1]!r}; {FORMAT!r} version {VERSION} is read")
            manifest = TypeAdapter(cls).validate_python(told)
        except FileNotFoundError:
            raise UserError(f"{folder}: no checkpoint, it has no {MANIFEST}; give a folder step_N") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; give a folder step_N") from error
        except (ValueError, RecursionError) as error:
            if isinstance(error, ValidationError):
                told = validation_lines(error)[0]
                raise UserError(f"{path}: {told}; the checkpoint is broken, use another") from error
            raise UserError(f"{path}: is no JSON: {error}; the checkpoint is broken, use another") from error
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"{path}: precision={self.precision!r} is none of {', '.join(PRECISIONS)}; use another")
        for name in self.files:
            leaves = PurePosixPath(name).name != name or name in ("", "..") or "\\" in name or len(name) > _LONGEST_NAME
            if leaves or (path.parent / name).is_symlink():
                raise UserError(f"{path}: names the file {name!r}; a checkpoint's files lie in its own folder")
        if STATE not in self.files:
            raise UserError(f"{path}: lists no {STATE}; the checkpoint is broken, use another")
        for name, tensor in self.tensors.items():
            _check_tensor(path, name, tensor, self.files)
        held = Counter[str]()
        for tensor in self.tensors.values():
            for chunk in tensor.chunks:
                held[chunk.file] += chunk.region.numel
        for name, elements in held.items():
            if 4 * elements > self.files[name].bytes:
                raise UserError(
                    f"{path}: the chunks in {name} hold {elements:,} elements, more than there are in its "
                    f"{self.files[name].bytes:,} bytes; the checkpoint is broken, use another"
                )


def _check_tensor(path: Path, name: str, tensor: StoredTensor, files: dict[str, FileRecord]) -> None:
    whole = Region.whole(tensor.shape)
    if not name.isprintable():
        raise UserError(f"{path}: {name!r} is no name of a tensor; the checkpoint is broken, use another")
    covered = 0
    for chunk in tensor.chunks:
        if chunk.file not in files:
            raise UserError(f"{path}: {name} lies in {chunk.file!r}, a file that is not listed; use another checkpoint")
        same_rank = len(chunk.offset) == len(chunk.shape) == len(tensor.shape)
        if not same_rank or min(chunk.shape, default=1) < 1 or chunk.region.intersect(whole) != chunk.region:
            raise UserError(f"{path}: {name} of {tensor.shape} has a chunk {chunk.shape} at {chunk.offset}, outside it")
        covered += chunk.region.numel
    if covered != whole.numel:
        raise UserError(f"{path}: the chunks of {name} hold {covered} of its {whole.numel} elements; use another")
    if overlap := _overlap([chunk.region for chunk in tensor.chunks]):
        raise UserError(f"{path}: {name} has two chunks that overlap, at {overlap[0].offset} and {overlap[1].offset}")


def _overlap(regions: list[Region]) -> tuple[Region, Region] | None:
    """Return two boxes that overlap, if there are any; boxes of disjoint rows are not held against each other."""
    reaching: list[Region] = []
    for region in sorted(regions, key=lambda one: one.offset):
        reaching = [one for one in reaching if not region.shape or one.offset[0] + one.shape[0] > region.offset[0]]
        for one in reaching:
            if one.intersect(region) is not None:
                return one, region
        reaching.append(region)
    return None
