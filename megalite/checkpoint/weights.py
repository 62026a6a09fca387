"""The weights in a megalite checkpoint, by their global names."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from megalite.checkpoint.manifest import KINDS
from megalite.checkpoint.mismatch_table import difference_table, shape_differences
from megalite.checkpoint.model_files import companions_among
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.special_tokens import DocumentTokens
from megalite.config import read_model
from megalite.config.validation import validation_lines
from megalite.errors import UserError
from megalite.model.shapes import weight_shapes
from megalite.model.weights import Weights
from megalite.parallel.regions import Region

WEIGHT = f"{KINDS[0]}/"
"""How the names of weights begin in a checkpoint; optimizer state has the optimizer's names for it."""


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

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        self.reader.read(WEIGHT + name, region, out)


class WeightSource:
    """Weights under the names that they have in a checkpoint."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        """Fill `out` with a box of a weight; the name begins with `WEIGHT`."""
        self._weights.read(name.removeprefix(WEIGHT), region, out)


def documents_of(weights: Weights) -> DocumentTokens | None:
    """Return what stood around the documents that weights were trained on, None where nothing tells."""
    return weights.reader.manifest.documents if isinstance(weights, CheckpointWeights) else None
