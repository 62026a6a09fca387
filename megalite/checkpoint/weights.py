"""The weights of a megalite checkpoint under their global names, as the `Weights` protocol."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from megalite.checkpoint.manifest import WEIGHT_KIND
from megalite.checkpoint.mismatch_table import mismatch_table, shape_mismatches
from megalite.checkpoint.model_files import model_files_among
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.special_tokens import DocumentTokens
from megalite.config import read_model
from megalite.errors import UserError
from megalite.model.registry import FAMILIES
from megalite.model.structure import weight_shapes
from megalite.model.weights import Weights, WeightValues
from megalite.parallel.regions import Region
from megalite.settings.validation import validation_lines

WEIGHT = f"{WEIGHT_KIND}/"
"""The prefix of weights' names in a checkpoint; optimizer state has the optimizer's names as prefixes."""


class CheckpointWeights:
    """The weights of a megalite checkpoint."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader
        self.origin = reader.folder
        self.precision = reader.manifest.precision
        try:
            self.model = read_model(reader.manifest.model)
        except ValidationError as error:
            reason, fix = validation_lines(error, whole="model")[0], "use another checkpoint"
            if reader.manifest.model.get("architecture") not in FAMILIES:
                fix = "name the module that registers its family with plugins of the run file, or with --plugin"
            raise UserError(f"{self.origin}: the manifest's model is not valid: {reason}; {fix}") from error
        tensors = reader.manifest.tensors.items()
        self.shapes = {name.removeprefix(WEIGHT): tensor.shape for name, tensor in tensors if name.startswith(WEIGHT)}
        if rows := shape_mismatches(weight_shapes(self.model), self.shapes):
            table = mismatch_table(rows, "by its model", "in its files")
            raise UserError(
                f"{self.origin}: the tensors do not fit the checkpoint's model:\n{table}use another checkpoint"
            )

    @property
    def model_files(self) -> Mapping[str, Path]:
        return model_files_among(self.origin, self.reader.manifest.files)

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        self.reader.read(WEIGHT + name, region, out)


class WeightSource:
    """A `TensorSource` of weights alone: adds the prefix that their names have in a checkpoint."""

    def __init__(self, weights: WeightValues) -> None:
        self._weights = weights

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        """Fill `out` with a region of a weight; the name begins with `WEIGHT`."""
        self._weights.read(name.removeprefix(WEIGHT), region, out)


def document_tokens(weights: Weights) -> DocumentTokens | None:
    """Return the tokens around the documents on which the weights were trained; None if unknown."""
    return weights.reader.manifest.documents if isinstance(weights, CheckpointWeights) else None
