"""Initial weights as a source of regions: what the seed and a weight's global name give, read like a file."""

import numpy as np
import torch

from megalite.config import ModelConfig
from megalite.model.shapes import weight_shapes
from megalite.parallel.regions import Region
from megalite.parallel.sharding import LocalShard, ShardSpec
from megalite.tensor_parallel.init import initialise_parameter


class InitialWeights:
    """The `Weights` of a model before its first step. A region costs the drawing of the blocks that it overlaps."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self._seed, self._shapes = seed, weight_shapes(model)
        self._std = model.initializer_range
        # The sum of 2 * layers residual branches then has the variance of one branch (GPT-2).
        self._residual_std = model.initializer_range / (2 * model.num_hidden_layers) ** 0.5

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        """Fill `out` with a region of a weight."""
        is_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
        shard = LocalShard(ShardSpec(name, self._shapes[name]), region, Region((0,) * out.ndim, out.shape))
        std = self._residual_std if is_residual else self._std
        initialise_parameter(torch.from_numpy(out), [shard], seed=self._seed, std=std)
