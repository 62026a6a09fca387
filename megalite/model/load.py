"""Weights into a stage, by their global names."""

from collections.abc import Callable

import numpy as np
import torch

from megalite.model.stage import Stage
from megalite.model.weights import Weights


@torch.no_grad()
def load_stage(stage: Stage, weights: Weights, progress: Callable[[int, int], None] | None = None) -> None:
    """Fill every parameter of a stage, and padding with 0; `progress` is told the bytes read and the bytes in all.

    Raises UserError where a weight cannot be read.
    """
    done, total = 0, 4 * stage.num_parameters()
    for placed in stage.placed_parameters:
        placed.parameter.zero_()
        for shard in placed.shards:
            target = placed.parameter[shard.target.slices]
            if target.numel():
                read = np.empty(target.shape, np.float32)
                weights.read(shard.spec.name, shard.source, read)
                target.copy_(torch.from_numpy(read))
                done += read.nbytes
                if progress is not None:
                    progress(done, total)
