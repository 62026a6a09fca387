"""Torch's own files: tensors, mapped from the disk, and plain data; of anything else nothing is made and nothing run.

This is the one module that reads a pickle, by torch's restricted reader alone. A trainer's file also holds objects of
the program that wrote it, an enumeration among its options or a generator's state. They are of no use here: for each
such name the reader is given a class that takes any state and forgets it, so that no code but this file's runs.
"""

import pickletools
import zipfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megalite.errors import UserError

FORGOTTEN_PACKAGES = frozenset(
    {"megatron", "deepspeed", "apex", "transformer_engine", "numpy", "_io", "io", "enum", "pathlib", "signal"}
)
"""Whose objects are forgotten; a name of another package is refused."""
GETATTR = "builtins.getattr"
"""How Python 3.11.0 to 3.11.3 name a member of an enumeration; forgotten as the enumeration is, and never called."""

OPTIONS = "argparse.Namespace"
"""The one class that is made: names and values, as Megatron keeps its options."""

_OLD_PICKLES = 4
"""What a file of torch before 1.6 begins with: a number, a version, the writer's word sizes, then the dict."""


class _Forgotten:
    """An object of the program that wrote the file, of which nothing is kept."""

    def __new__(cls, *args: object) -> "_Forgotten":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def __repr__(self) -> str:
        return "(an object of its program)"


def read_torch_file(path: Path) -> dict[str, Any]:
    """Return the dict that a file holds; its tensors are read from the disk when they are used.

    Raises UserError for a file that names code of other packages, is damaged, or holds no dict.
    """
    import torch

    try:
        # Files of torch before 1.6 are no archives, and are read whole.
        mapped = zipfile.is_zipfile(path)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else _named_in_old_file(path)
        with torch.serialization.safe_globals(_allowed(path, named)):
            content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle fails in any way there is
        raise UserError(
            f"{path}: cannot be read as tensors and plain data: {_reason(error)}; use another checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds {type(content).__name__}, where a checkpoint holds a dict; use another checkpoint"
        )
    return content


def _named_in_old_file(path: Path) -> Iterable[str]:
    with path.open("rb") as file:
        operations = (operation for _ in range(_OLD_PICKLES) for operation in pickletools.genops(file))
        named = {str(name).replace(" ", ".") for operation, name, _ in operations if operation.name == "GLOBAL"}
    # Old pickles call builtins as Python 2 did. Torch's own names are allowed as they are.
    named = {name.replace("__builtin__.", "builtins.") for name in named}
    return {name for name in named if name.partition(".")[0] not in ("torch", "collections", "_codecs")}


def _allowed(path: Path, named: Iterable[str]) -> list[Any]:
    known = (OPTIONS, GETATTR)
    foreign = sorted(name for name in named if not (name in known or name.partition(".")[0] in FORGOTTEN_PACKAGES))
    if foreign:
        raise UserError(
            f"{path}: names {', '.join(foreign)}: code, which is never run; tensors, plain data and the options of "
            "Megatron are read; save it again with nothing else, or use another checkpoint"
        )
    return [Namespace, *((_Forgotten, name) for name in named if name != OPTIONS)]


def _reason(error: Exception) -> str:
    """Return the line of torch's long message that tells something."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "Unpickler error" in line), lines[0])
