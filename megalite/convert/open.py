"""Open a model's weights wherever they lie: a checkpoint, a run's folder, a Hugging Face or Megatron folder."""

import json
from pathlib import Path
from typing import Any

from megalite.checkpoint.discovery import CHECKPOINTS, checkpoint_root, find_checkpoints, unfinished_saves
from megalite.checkpoint.forecast import when_saved
from megalite.checkpoint.manifest import MANIFEST
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.weights import CheckpointWeights
from megalite.config import load_run_config
from megalite.config.hub_names import hub_hint
from megalite.convert.huggingface.reader import HuggingFaceWeights, is_hugging_face
from megalite.convert.megatron.reader import MegatronWeights
from megalite.convert.megatron.state_dict import checkpoint_folder
from megalite.errors import UserError
from megalite.model.weights import Weights
from megalite.settings.validation import show
from megalite.text_encoding import require_utf8

_RUN_FILES = ("config.yaml", "STATE.json")
"""What a run's folder has before it has a checkpoint: one of them, or both."""
_OTHERS = "a Hugging Face or Megatron folder on this machine"


def open_weights(path: Path) -> Weights:
    """Open a checkpoint, the newest one of a run's folder, a Hugging Face folder, or a checkpoint of Megatron's.

    Raises UserError where there is none.
    """
    if is_hugging_face(path):
        return HuggingFaceWeights(path)
    root = checkpoint_root(path)
    if root is not None and (newest := find_checkpoints(root)):
        return CheckpointWeights(CheckpointReader(newest[0][1]))
    if checkpoint_folder(path) is not None:
        return MegatronWeights(path)
    if not path.is_dir() or not (path / MANIFEST).exists():
        if (missing := no_checkpoint_yet(path)) is not None:
            raise UserError(f"{missing}; `megalite status {run_of(path)}` shows the state of the run")
        fix = hub_hint(path) or f"give a checkpoint step_N, a run's folder, or {_OTHERS}"
        raise UserError(f"{path}: {_what_it_is(path)}; {fix}")
    return CheckpointWeights(CheckpointReader(path))


def run_of(path: Path) -> Path | None:
    """Return the folder of the run that `path` belongs to, as its folder or that of its checkpoints; None for none."""
    for folder in (path, path.parent) if path.name == CHECKPOINTS else (path,):
        if any((folder / name).is_file() for name in _RUN_FILES):
            return folder
    return None


def no_checkpoint_yet(path: Path) -> str | None:
    """Return that a run's folder holds no checkpoint, and when one will be there; None for any other folder."""
    run = run_of(path)
    if run is None or find_checkpoints(run / CHECKPOINTS) or is_hugging_face(path):
        return None
    resolved, state = (run / name for name in _RUN_FILES)
    try:
        when = f"the run keeps them {when_saved(load_run_config(resolved, []))}"
    except UserError:
        if not state.is_file():
            return None
        when = "a run keeps one at its last step, unless its run file says otherwise"
    growing = "".join(f"; {save.name} is a save that has not ended" for save in unfinished_saves(run / CHECKPOINTS))
    return f"{path}: no checkpoint yet: {when}{growing}"


def section_of_weights(path: Path) -> dict[str, Any]:
    """Return the section `model` of the weights of `init_from`, every key of it; raise UserError for no weights."""
    try:
        return open_weights(path).model.model_dump(mode="json")
    except UserError as error:
        raise UserError(f"init_from={error}") from error


def _what_it_is(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, where there is nothing"
    if not path.exists():
        return "there is no such folder" if path.is_absolute() else f"there is no such folder in {Path.cwd()}"
    if not path.is_dir():
        return "is a file, not a folder"
    if (path / "config.json").exists():
        return _what_is_wrong_with(path / "config.json")
    if any(path.glob("*.safetensors")):
        return "has safetensors, but no config.json beside them"
    return "holds no model"


def _what_is_wrong_with(config: Path) -> str:
    """Say why a config.json is not that of a model of Hugging Face's."""
    try:
        data = config.read_bytes()
        require_utf8(config, data)
        content = json.loads(data)
    except (OSError, ValueError) as error:
        return f"its config.json cannot be read as JSON ({error}), fetch the file again"
    if not isinstance(content, dict):
        return f"its config.json holds {show(content)}, where an object with a model_type is read"
    if "model_type" not in content:
        return "its config.json has no model_type, which says what the model computes"
    return f"its config.json has model_type={show(content['model_type'])}, where a name such as 'llama' is read"
