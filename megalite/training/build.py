"""Construction of the pipeline stages that a rank holds."""

from dataclasses import replace

from megalite.kernels.choice import NATIVE, Kernels
from megalite.model.load import load_stage
from megalite.model.stage import Stage
from megalite.model.weights import Weights
from megalite.parallel.mesh import Mesh
from megalite.training.plan import Plan


def build_stages(plan: Plan, mesh: Mesh, weights: Weights | None = None, kernels: Kernels = NATIVE) -> dict[int, Stage]:
    """Build this rank's stages; load `weights`, or initialise parameters from the seed and their names."""
    parallel = plan.config.parallel
    group = replace(
        mesh.tensor, sequence_parallel=parallel.sequence_parallel, overlap=parallel.overlap, kernels=kernels
    )
    stages: dict[int, Stage] = {}
    for index in mesh.stages:
        stage = stages[index] = Stage(
            plan.config.model,
            plan.stage_layers[index],
            index=index,
            num_stages=plan.placement.num_stages,
            group=group,
            rows=plan.config.train.micro_batch_size,
            recompute=plan.config.recompute,
            table=stages[0].tied_table if 0 in stages else None,
        )
        if weights is None:
            stage.initialise(plan.config.run.seed)
        else:
            load_stage(stage, weights)
    return stages
