"""A model's weights by their global names, wherever they lie: what training, generating and converting read from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import ValidationError

from megalite.checkpoint.boxes import Box
from megalite.checkpoint.companions import GENERATION_CONFIG, companions_among, read_settings
from megalite.checkpoint.differences import difference_table, shape_differences
from megalite.checkpoint.huggingface.reader import HuggingFaceWeights, is_hugging_face
from megalite.checkpoint.manifest import KINDS, MANIFEST
from megalite.checkpoint.megatron.collection import checkpoint_folder
from megalite.checkpoint.megatron.weights import MegatronWeights
from megalite.checkpoint.reader import CheckpointReader, checkpoints
from megalite.checkpoint.shapes import weight_shapes
from megalite.checkpoint.special_tokens import TOKEN_IDS, DocumentTokens
from megalite.config import ModelConfig, read_model
from megalite.errors import UserError
from megalite.faults import show, validation_lines

WEIGHT = f"{KINDS[0]}/"
"""How the names of weights begin in a checkpoint; optimizer state has the optimizer's names for it."""


_OTHERS = "a Hugging Face or Megatron folder on this machine"


class Weights(Protocol):
    """The weights of one model; each box of each is read when it is asked for."""

    @property
    def origin(self) -> Path:
        """The folder or file, for messages."""
        ...

    @property
    def model(self) -> ModelConfig:
        """The model, its vocabulary size among the rest."""
        ...

    @property
    def precision(self) -> str:
        """What the weights were trained or stored in: fp32, bf16 or fp16."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The global shape of each weight, by its global name."""
        ...

    @property
    def companions(self) -> Mapping[str, Path]:
        """The files beside the weights that go with them, by their names."""
        ...

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        """Fill `out`, fp32 of the box's shape, with a box of a weight; raise UserError where that cannot be read."""
        ...


class CheckpointWeights:
    """The weights of a megalite checkpoint."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader
        self.origin = reader.folder
        self.precision = reader.manifest.precision
        try:
            self.model = read_model(reader.manifest.model)
        except ValidationError as error:
            reason = validation_lines(error, below=1, whole="model")[0]
            raise UserError(f"{self.origin}: its manifest names no model that megalite knows: {reason}") from error
        tensors = reader.manifest.tensors.items()
        self.shapes = {name.removeprefix(WEIGHT): tensor.shape for name, tensor in tensors if name.startswith(WEIGHT)}
        if rows := shape_differences(weight_shapes(self.model), self.shapes):
            table = difference_table(rows, "its model asks", "it holds")
            raise UserError(
                f"{self.origin}: the tensors are not those of its own model:\n{table}use another checkpoint"
            )

    @property
    def companions(self) -> Mapping[str, Path]:
        return companions_among(self.origin, self.reader.manifest.files)

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        self.reader.read(WEIGHT + name, box, out)


class WeightSource:
    """Weights under the names that they have in a checkpoint."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def read(self, name: str, box: Box, out: np.ndarray) -> None:
        """Fill `out` with a box of a weight; the name begins with `WEIGHT`."""
        self._weights.read(name.removeprefix(WEIGHT), box, out)


def generation_settings(weights: Weights, companions: Mapping[str, Path]) -> tuple[dict[str, Any], str]:
    """Return what says how generation from weights ends, and the file it stands in, for messages.

    As in transformers that is ``generation_config.json`` among `companions`, or ``config.json`` of a Hugging Face
    folder where there is no such file. Raises UserError where the file cannot be read.
    """
    path = companions.get(GENERATION_CONFIG)
    if path is not None or not isinstance(weights, HuggingFaceWeights):
        return read_settings(path), str(path)
    told = {key: weights.config[key] for key in TOKEN_IDS if weights.config.get(key) is not None}
    return told, str(weights.origin / "config.json")


def companion_contents(weights: Weights, companions: Mapping[str, Path]) -> dict[str, bytes]:
    """Return the contents of the files that go with weights, `companions`, as they are.

    What ``config.json`` of a Hugging Face folder says of special tokens becomes a ``generation_config.json`` where
    there is none, since that file does not go along.
    """
    contents = {name: path.read_bytes() for name, path in companions.items()}
    if GENERATION_CONFIG not in contents and (told := generation_settings(weights, companions)[0]):
        contents[GENERATION_CONFIG] = (json.dumps(told, indent=2) + "\n").encode()
    return contents


def documents_of(weights: Weights) -> DocumentTokens | None:
    """Return what stood around the documents that weights were trained on, None where nothing tells."""
    return weights.reader.manifest.documents if isinstance(weights, CheckpointWeights) else None


def open_weights(path: Path) -> Weights:
    """Open a checkpoint, the newest one of a run's folder, a Hugging Face folder, or a checkpoint of Megatron's.

    Raises UserError where there is none.
    """
    if is_hugging_face(path):
        return HuggingFaceWeights(path)
    for folder in (path, path / "checkpoints"):
        newest = checkpoints(folder)
        if newest:
            return CheckpointWeights(CheckpointReader(newest[0][1]))
    if checkpoint_folder(path) is not None:
        return MegatronWeights(path)
    if not path.is_dir() or not (path / MANIFEST).exists():
        raise UserError(f"{path}: {_what_it_is(path)}; give a checkpoint step_N, a run's folder, or {_OTHERS}")
    return CheckpointWeights(CheckpointReader(path))


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
        content = json.loads(config.read_bytes())
    except (OSError, ValueError) as error:
        return f"its config.json cannot be read as JSON ({error}), fetch the file again"
    if not isinstance(content, dict):
        return f"its config.json holds {show(content)}, where an object with a model_type is read"
    if "model_type" not in content:
        return "its config.json has no model_type, which says what the model computes"
    return f"its config.json has model_type={show(content['model_type'])}, where a name such as 'llama' is read"
