"""What stands in the place of a run file: a folder, an empty file, a file of another program, each with the fix."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalite.config.deepspeed.table import TABLE
from megalite.config.run_config import RunConfig
from megalite.errors import UserError
from megalite.settings.section import fields_of
from megalite.settings.validation import show

_RUN_FILES = ("config.yaml", "run.yaml")
"""The run file of a run's folder or of a checkpoint, which megalite writes, and its usual name elsewhere."""
_EXAMPLE = "examples/quickstart/run.yaml is a whole one, and docs/reference/run_file.md describes every key"
_HUGGING_FACE = ("model_type", "architectures")
"""Keys of a model's ``config.json`` that no run file has."""


def require_no_folder(path: Path) -> None:
    """Raise UserError where `path` is a folder; the message names the run file in it where there is one."""
    if not path.is_dir():
        return
    run_files = [path / name for name in _RUN_FILES if (path / name).is_file()]
    if run_files:
        raise UserError(f"{path}: is a folder, not a run file; write {run_files[0]}")
    if (path / "config.json").is_file():
        raise UserError(f"{path}: is the folder of a model, not a run file; {_begin_with(path)}")
    found = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".yaml", ".yml"))
    fix = f"it has {', '.join(found[:4])}" if found else _EXAMPLE
    raise UserError(f"{path}: is a folder, not a run file; name a file: {fix}")


def require_sections(path: Path, document: object) -> dict[str, Any]:
    """Return what a YAML file holds where that may be the sections of a run; raise UserError for anything else."""
    sections = fields_of(RunConfig)
    if not document and (document is None or isinstance(document, Mapping)):
        needed = [name for name, info in sections.items() if info.is_required()]
        written = f"{', '.join(needed[:-1])} and {needed[-1]}"
        raise UserError(f"{path.name}: the file is empty; write the sections {written}: {_EXAMPLE}")
    if not isinstance(document, Mapping):
        raise UserError(f"{path.name}: the file holds {show(document)}; write sections: {', '.join(sections)}")
    if any(key in document for key in _HUGGING_FACE) and not document.keys() & sections.keys():
        what = "is the configuration of a Hugging Face model, not a run file"
        raise UserError(f"{path}: {what}; {_begin_with(path.parent)}")
    if document.keys() <= TABLE.keys() and not document.keys() <= sections.keys():
        raise UserError(
            f"{path}: is a DeepSpeed JSON, not a run file; write deepspeed: {path} in a run file: {_EXAMPLE}"
        )
    return dict(document)


def _begin_with(folder: Path) -> str:
    fix = f"write init_from: {folder} in a run file to begin with its weights"
    return f"{fix}, or its sizes into a section model to begin anew: {_EXAMPLE}"
