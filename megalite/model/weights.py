"""The protocol of sources of weights: a model's weights by their global names, in any file format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from megalite.model.config import ModelConfig
from megalite.parallel.regions import Region


class WeightValues(Protocol):
    """Values of weights by their global names: read from files, or drawn."""

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        """Read a region of a weight into `out`, fp32 of the region's shape; raise UserError where it cannot be read."""
        ...


class Weights(WeightValues, Protocol):
    """The weights of one model; regions of weights are read on demand."""

    @property
    def origin(self) -> Path:
        """The folder or file of the weights, for messages."""
        ...

    @property
    def model(self) -> ModelConfig:
        """The configuration of the model, with its vocabulary size."""
        ...

    @property
    def precision(self) -> str:
        """The precision in which the weights were trained or stored: fp32, bf16 or fp16."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The global shape of each weight, by its global name."""
        ...

    @property
    def model_files(self) -> Mapping[str, Path]:
        """The files beside the weights, such as those of the tokenizer, by their names."""
        ...
