"""The checkpoint's ``manifest.json``: tensors, their chunks and files; untrusted input, validated when it is read.

A tensor is identified by its global name and is divided into chunks: regions that cover it without overlap, in any of
the files. The manifest does not depend on the ranks that wrote it; `layout` is for readers only.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from megalite.checkpoint.safetensors_file import ENCODINGS, FileRecord
from megalite.checkpoint.special_tokens import DocumentTokens
from megalite.errors import UserError
from megalite.parallel.regions import Region
from megalite.settings.validation import validation_lines

FORMAT = "megalite checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
PRECISIONS = tuple(ENCODINGS)
_LONGEST_NAME = 200
WEIGHT_KIND = "weight"
"""A stored tensor is named ``KIND/NAME``: the kind is this one, or a name of the optimizer's state."""
_OPTIMIZER_OF_BEFORE = "adamw"
"""The optimizer of checkpoints whose manifest does not name one."""


@dataclass(frozen=True, slots=True)
class OptimizerRecord:
    """The optimizer that wrote a checkpoint's state; `state` are the names of the state tensors that it declares."""

    name: str
    state: tuple[str, ...]
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """The settings of the run file, for readers; a resumed run takes those of its own run file."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A region of a global tensor: the array `key` of the safetensors file `file`."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def region(self) -> Region:
        """The region within the global tensor."""
        return Region(self.offset, self.shape)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A global tensor; `dtype` is safetensors' name of its dtype."""

    shape: tuple[int, ...]
    dtype: Literal["F32"]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of ``manifest.json``."""

    step: Annotated[int, Field(ge=0, lt=1 << 63)]
    tensors: dict[str, StoredTensor]
    files: dict[str, FileRecord]
    versions: dict[str, str] = field(default_factory=dict)
    """The versions of megalite, torch and deepspeed."""
    layout: str = ""
    """The layout of the ranks that wrote the checkpoint, as text for readers."""
    model: dict[str, Any] = field(default_factory=dict)
    """The run file's section `model`."""
    precision: str = "fp32"
    """The precision of the training or of the source: fp32, bf16 or fp16. The stored tensors are always fp32."""
    config_sha256: str | None = None
    tokenizer_sha256: str | None = None
    documents: DocumentTokens | None = None
    """The tokens around the documents of the training data; None if unknown."""
    optimizer: OptimizerRecord | None = None
    """The optimizer; None in a checkpoint of weights alone, and in older checkpoints, which are AdamW's."""
    format: str = FORMAT
    version: int = VERSION

    @property
    def trained_by(self) -> str | None:
        """The name of the optimizer whose state the checkpoint holds; None where it holds weights alone."""
        if self.optimizer is not None:
            return self.optimizer.name
        has_state = any(not name.startswith(f"{WEIGHT_KIND}/") for name in self.tensors)
        return _OPTIMIZER_OF_BEFORE if has_state else None

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and validate a checkpoint's manifest, without opening the files that it names.

        Raises UserError if the manifest is missing or invalid, names a file outside of its folder, or has chunks that
        do not cover their tensors exactly.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            form = (content.get("format"), content.get("version")) if isinstance(content, dict) else (None, None)
            if form != (FORMAT, VERSION):
                raise UserError(
                    f"{path}: has format {form[0]!r}, version {form[1]!r}; this megalite reads {FORMAT!r}, version "
                    f"{VERSION}"
                )
            manifest = TypeAdapter(cls).validate_python(content)
        except FileNotFoundError:
            raise UserError(f"{folder}: is not a checkpoint: it has no {MANIFEST}; give a folder step_N") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; give a folder step_N") from error
        except (ValueError, RecursionError) as error:
            if isinstance(error, ValidationError):
                problem = validation_lines(error)[0]
                raise UserError(f"{path}: {problem}; the checkpoint is broken, use another") from error
            raise UserError(f"{path}: is not JSON: {error}; the checkpoint is broken, use another") from error
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(
                f"{path}: precision={self.precision!r} is none of {', '.join(PRECISIONS)}; use another checkpoint"
            )
        for name in self.files:
            leaves = PurePosixPath(name).name != name or name in ("", "..") or "\\" in name or len(name) > _LONGEST_NAME
            if leaves or (path.parent / name).is_symlink():
                raise UserError(
                    f"{path}: names the file {name!r}; a checkpoint's files must be in its own folder; use another "
                    "checkpoint"
                )
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
                    f"{path}: the chunks in {name} have {elements:,} elements, more than fit in its "
                    f"{self.files[name].bytes:,} bytes; the checkpoint is broken, use another"
                )


def _check_tensor(path: Path, name: str, tensor: StoredTensor, files: dict[str, FileRecord]) -> None:
    whole = Region.whole(tensor.shape)
    if not name.isprintable():
        raise UserError(f"{path}: {name!r} is not a tensor's name; the checkpoint is broken, use another")
    covered = 0
    for chunk in tensor.chunks:
        if chunk.file not in files:
            raise UserError(f"{path}: {name} is in {chunk.file!r}, which is not listed; use another checkpoint")
        same_rank = len(chunk.offset) == len(chunk.shape) == len(tensor.shape)
        if not same_rank or min(chunk.shape, default=1) < 1 or chunk.region.intersect(whole) != chunk.region:
            raise UserError(
                f"{path}: {name} of shape {tensor.shape} has a chunk of shape {chunk.shape} at {chunk.offset}, outside "
                "of it; the checkpoint is broken, use another"
            )
        covered += chunk.region.numel
    if covered != whole.numel:
        raise UserError(
            f"{path}: the chunks of {name} cover {covered} of its {whole.numel} elements; the checkpoint is broken, "
            "use another"
        )
    if overlap := _overlap([chunk.region for chunk in tensor.chunks]):
        raise UserError(
            f"{path}: {name} has two chunks that overlap, at {overlap[0].offset} and {overlap[1].offset}; the "
            "checkpoint is broken, use another"
        )


def _overlap(regions: list[Region]) -> tuple[Region, Region] | None:
    """Return two regions that overlap, if any, by a sweep over the first dimension."""
    active: list[Region] = []
    for region in sorted(regions, key=lambda region: region.offset):
        active = [other for other in active if not region.shape or other.offset[0] + other.shape[0] > region.offset[0]]
        for other in active:
            if other.intersect(region) is not None:
                return other, region
        active.append(region)
    return None
