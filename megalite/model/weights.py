"""The protocol of a model's weights by their global names, wherever they lie: what a model is filled from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from megalite.config import ModelConfig
from megalite.parallel.regions import Region


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
    def model_files(self) -> Mapping[str, Path]:
        """The files beside the weights that go with them, by their names."""
        ...

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        """Fill `out`, fp32 of the box's shape, with a box of a weight; raise UserError where that cannot be read."""
        ...
