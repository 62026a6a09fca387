"""Construction of the pipeline stages that a rank holds, of the engine that trains them, and of the executor."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist

from megalite.checkpoint.weights import WeightSource
from megalite.kernels.choice import NATIVE, Kernels
from megalite.model.initial_weights import InitialWeights
from megalite.model.load import load_stage
from megalite.model.loss import loss_function
from megalite.model.stage import Stage
from megalite.model.weights import Weights
from megalite.parallel.mesh import Mesh
from megalite.pipeline.executor import PipelineExecutor
from megalite.pipeline.stage_io import exchange_edges
from megalite.planning.plan import Plan
from megalite.planning.start import Start
from megalite.training.engine import Engine


def build_engine(plan: Plan, mesh: Mesh, start: Start, kernels: Kernels = NATIVE) -> Engine:
    """Build this rank's stages and the engine that trains them, in the state of `start`. Collective."""
    engine = _build_engine(plan, mesh, start.weights, kernels, resumes=start.reader is not None)
    if start.reader is not None:
        engine.state.restore(start.reader, start.reader.state["optimizer"])
    return engine


def _build_engine(plan: Plan, mesh: Mesh, weights: Weights | None, kernels: Kernels, *, resumes: bool) -> Engine:
    """Build an engine with `weights`, or with those of the seed and their names.

    `resumes`: the master weights are restored later, with the rest of the state.
    """
    if plan.config.engine == "torch":
        from megalite.fsdp.engine import TorchEngine

        # Each rank reads or draws only its own shares.
        with torch.device("meta"):
            stages = build_stages(plan, mesh, kernels, shares_table=False)
        engine = TorchEngine(stages, plan.config, mesh, plan.parameter_settings)
        source = weights or InitialWeights(stages.values(), plan.config.run.seed)
        engine.state.restore_weights(WeightSource(source))
        return engine
    from megalite.zero.engine import ZeroEngine

    stages = build_stages(plan, mesh, kernels)
    for stage in stages.values():
        if weights is None:
            stage.initialise(plan.config.run.seed)
        else:
            load_stage(stage, weights)
    engine = ZeroEngine(stages, plan.config, mesh, plan.parameter_settings)
    if weights is not None and not resumes:
        engine.state.restore_weights(WeightSource(weights))  # the stages hold them in the model's precision
    return engine


def build_stages(plan: Plan, mesh: Mesh, kernels: Kernels = NATIVE, *, shares_table: bool = True) -> dict[int, Stage]:
    """Build this rank's stages with weights that are not set yet; frozen parameters do not require gradients.

    `shares_table`: where this rank has the first and the last stage, a tied table is one parameter of both.
    """
    parallel = plan.config.parallel
    group = replace(
        mesh.tensor, sequence_parallel=parallel.sequence_parallel, overlap=parallel.overlap, kernels=kernels
    )
    stages: dict[int, Stage] = {}
    for index in mesh.stages:
        stages[index] = Stage(
            plan.config.model,
            plan.stage_layers[index],
            index=index,
            num_stages=plan.placement.num_stages,
            group=group,
            rows=plan.config.train.micro_batch_size,
            recompute=plan.config.recompute,
            compiled=plan.config.train.compile,
            table=stages[0].tied_table if shares_table and 0 in stages else None,
            loss=loss_function(plan.config.train.loss),
        )
        stages[index].freeze(plan.frozen)
    return stages


def build_executor(
    engine: Engine, plan: Plan, mesh: Mesh, *, on_progress: Callable[[], None] = lambda: None
) -> PipelineExecutor:
    """Build the executor of this rank's stages; `on_progress` is called after every instruction. Collective."""
    size = plan.config.train.micro_batch_size, plan.config.data.sequence_length
    return PipelineExecutor(
        engine,
        mesh.links,
        placement=plan.placement,
        rank=mesh.pipeline.rank,
        edges=exchange_edges({index: stage.edge(*size) for index, stage in engine.stages.items()}, mesh),
        device=mesh.device,
        first_trained=_first_trained_stage(engine.stages, mesh),
        on_progress=on_progress,
    )


def _first_trained_stage(stages: Mapping[int, Stage], mesh: Mesh) -> int:
    """Return the index of the first stage of the pipeline with a parameter that is not frozen. Collective."""
    trained = [index for index, stage in stages.items() if any(p.requires_grad for p in stage.parameters())]
    first = torch.tensor(min(trained, default=mesh.placement.num_stages), device=mesh.device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=mesh.pipeline.process_group)
    return int(first)
