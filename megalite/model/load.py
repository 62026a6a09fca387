"""Loading of weights into a stage, by their global names."""

from collections.abc import Callable

import numpy as np
import torch

from megalite.model.stage import Stage
from megalite.model.weights import WeightValues


@torch.no_grad()
def load_stage(stage: Stage, weights: WeightValues, progress: Callable[[int, int], None] | None = None) -> None:
    """Load every parameter of a stage, and set padding to 0. Raises UserError where a weight cannot be read.

    `progress` is called with the number of bytes read so far and the number of bytes in all.
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
