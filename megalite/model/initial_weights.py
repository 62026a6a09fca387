"""Initial weights as a source of regions: what the seed and a weight's global name give, read like a file."""

from collections.abc import Iterable

import numpy as np
import torch

from megalite.model.stage import Stage
from megalite.parallel.regions import Region
from megalite.parallel.sharding import LocalShard
from megalite.tensor_parallel.init import initialise_parameter


class InitialWeights:
    """The weights of stages before their first step. A region costs the drawing of the blocks that it overlaps."""

    def __init__(self, stages: Iterable[Stage], seed: int) -> None:
        self._seed = seed
        self._weights = {
            shard.spec.name: (shard.spec, stage.initial_std(placed))
            for stage in stages
            for placed in stage.placed_parameters
            for shard in placed.shards
        }

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        """Fill `out` with a region of a weight."""
        spec, std = self._weights[name]
        shard = LocalShard(spec, region, Region((0,) * out.ndim, out.shape))
        initialise_parameter(torch.from_numpy(out), [shard], seed=self._seed, std=std)
