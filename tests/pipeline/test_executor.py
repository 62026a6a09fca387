"""The executor on stages with several tensors on an edge and losses of their own, against torch's autograd.

The stages here know nothing of a language model: a microbatch is a dict of their own, and every edge has other tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from torch import Tensor, nn

from megalite.parallel.layout import ParallelLayout
from megalite.parallel.mesh import build_mesh
from megalite.parallel.tensor_group import TensorGroup
from megalite.pipeline.executor import PipelineExecutor, StepResult
from megalite.pipeline.schedules import SCHEDULES, forward_only, placement
from megalite.pipeline.stage_io import Edge, StageOutput, TensorSpec, exchange_edges
from megalite.tensor_parallel.layers import ColumnParallelLinear
from megalite.tensor_parallel.weight_grad_store import WeightGradDeferral, WeightGradStore

CPU = torch.device("cpu")
STAGES, MICROBATCHES, ROWS, WIDTH = 4, 4, 3, 5
SCALE = 1024.0
"""A loss scale, which must reach every gradient once."""
Microbatch = Mapping[str, Tensor]


class ToyStage(nn.Module):
    """Hands on hidden states, whose width grows, and a memory of the first stage that only the last one reads.

    The first edge also has a tensor that nobody reads; all edges have integers and numbers without gradients.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.first, self.last = index, index == 0, index == STAGES - 1
        self.linear = ColumnParallelLinear(WIDTH + index, WIDTH + index + 1, group=TensorGroup(), bias=True)
        self.memory = nn.Parameter(torch.empty(2, 4)) if self.first else None
        self.unread = nn.Parameter(torch.empty(3)) if self.first else None
        self.linear.weight_grad_deferral = self.deferral = WeightGradDeferral()
        generator = torch.Generator().manual_seed(index)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, inputs: Mapping[str, Tensor], microbatch: Microbatch) -> StageOutput:
        if self.memory is not None and self.unread is not None:
            source = microbatch["source"]
            memory = (self.memory * source.mean()).double()
            carried = {"memory": memory, "factor": source.exp().sum(), "shift": microbatch["shift"]}
            carried["unread"] = self.unread * 2
            x = source
        else:
            assert "unread" not in inputs or self.index == 1
            carried = {name: inputs[name] for name in ("memory", "factor", "shift")}
            x = inputs["hidden"]
        hidden = torch.tanh(self.linear(x)) * carried["factor"] + carried["shift"].sum()
        penalty = {"penalty": (self.index + 1) * hidden.square().mean() / MICROBATCHES}
        if self.first:
            return StageOutput({"hidden": hidden, **carried}, {})
        if not self.last:
            return StageOutput({"hidden": hidden, **carried}, penalty)
        error = (hidden.sum(1) - microbatch["target"] * carried["memory"].float().square().sum()).square()
        return StageOutput({}, {"loss": error.mean() / MICROBATCHES, **penalty})

    def edge(self) -> Edge:
        if self.last:
            return {}
        unread = {"unread": TensorSpec((3,), torch.float32)} if self.first else {}
        return {
            "factor": TensorSpec((), torch.float32, requires_grad=False),
            "hidden": TensorSpec((ROWS, WIDTH + self.index + 1), torch.float32),
            **unread,
            "memory": TensorSpec((2, 4), torch.float64),
            "shift": TensorSpec((2,), torch.int64),
        }


class ToyEngine:
    """Torch's autograd with a loss scale."""

    def __init__(self, stages: Mapping[int, ToyStage]) -> None:
        self.stages, self.reduced = stages, list[int]()

    def forward(self, stage: int, inputs: dict[str, Tensor], microbatch: Microbatch) -> StageOutput:
        return self.stages[stage](inputs, microbatch)

    def backward(self, stage: int, scalar: Tensor, *, last: bool) -> None:
        (scalar * SCALE).backward()

    @contextmanager
    def defer_weight_grads(self, stage: int) -> Iterator[WeightGradStore]:
        with self.stages[stage].deferral.enabled() as store:
            yield store

    def compute_weight_grads(self, stage: int, store: WeightGradStore) -> None:
        def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

        store.run(accumulate)

    def reduce_gradients(self, stage: int) -> bool:
        self.reduced.append(stage)
        return True


def microbatches() -> list[Microbatch]:
    generator = torch.Generator().manual_seed(77)
    return [
        {
            "source": torch.randn(ROWS, WIDTH, generator=generator),
            "target": torch.randn(ROWS, generator=generator),
            "shift": torch.tensor([number, -1]),
        }
        for number in range(MICROBATCHES)
    ]


Numbers = tuple[dict[str, float], dict[str, Tensor]]
"""Losses and gradients by name."""


def numbers(result: Mapping[str, Tensor], stages: Mapping[int, ToyStage]) -> Numbers:
    gradients = {
        f"{index}.{name}": torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / SCALE
        for index, stage in stages.items()
        for name, parameter in stage.named_parameters()
    }
    return {name: float(loss) for name, loss in result.items()}, gradients


def in_one_process() -> Numbers:
    stages = {index: ToyStage(index) for index in range(STAGES)}
    sums: dict[str, Tensor] = {}
    for microbatch in microbatches():
        output = StageOutput({}, {})
        for stage in stages.values():
            output = stage(output.activations, microbatch)
            for name, loss in output.losses.items():
                sums[name] = sums.get(name, torch.zeros(())) + loss
    (sum(sums.values(), torch.zeros(())) * SCALE).backward()
    return numbers({name: loss.detach() for name, loss in sums.items()}, stages)


def executor_of(name: str, virtual_stages: int) -> tuple[PipelineExecutor, ToyEngine]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layout, places = ParallelLayout(tensor=1, pipeline=ranks, data=1), placement(name, ranks, virtual_stages)
    mesh = build_mesh(layout, rank, device=CPU, timeout=timedelta(seconds=60), placement=places)
    engine = ToyEngine({index: ToyStage(index) for index in mesh.stages})
    edges = exchange_edges({index: stage.edge() for index, stage in engine.stages.items()}, mesh)
    assert edges == {index: ToyStage(index).edge() for index in range(STAGES)}
    assert list(edges[0]) == ["factor", "hidden", "unread", "memory", "shift"]
    return PipelineExecutor(engine, mesh.links, placement=places, rank=rank, edges=edges, device=CPU), engine


def train(name: str, virtual_stages: int) -> Numbers:
    executor, engine = executor_of(name, virtual_stages)
    stream = SCHEDULES[name](dist.get_rank(), executor.placement, MICROBATCHES)
    losses = executor.run(stream, microbatches()).losses
    assert sorted(engine.reduced) == sorted(engine.stages)
    return numbers(losses, engine.stages)


def evaluate() -> dict[str, float]:
    executor, engine = executor_of("1f1b", 1)
    result: StepResult = executor.run(forward_only(dist.get_rank(), executor.placement, MICROBATCHES), microbatches())
    assert all(parameter.grad is None for stage in engine.stages.values() for parameter in stage.parameters())
    return {name: float(loss) for name, loss in result.losses.items()}


def added(ranks: list[dict[str, float]]) -> dict[str, float]:
    """The losses summed over the ranks."""
    return {name: sum(losses.get(name, 0.0) for losses in ranks) for name in ("loss", "penalty")}


@pytest.mark.parametrize(
    ("name", "ranks", "virtual_stages"),
    [
        ("1f1b", 4, 1),
        ("gpipe", 4, 1),
        ("interleaved_1f1b", 2, 2),
        ("zb_h1", 4, 1),
        ("zb_v", 2, 2),
        ("interleaved_1f1b", 1, 4),
    ],
)
def test_every_edge_and_every_loss_of_a_stage_has_its_gradient(name: str, ranks: int, virtual_stages: int) -> None:
    losses, gradients = in_one_process()
    found = run_distributed(train, ranks, name, virtual_stages)
    assert added([losses for losses, _ in found]) == pytest.approx(losses, rel=1e-6)
    for name, gradient in [item for _, of_rank in found for item in of_rank.items()]:
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert sorted(name for _, of_rank in found for name in of_rank) == sorted(gradients)
    assert gradients["0.memory"].abs().max() > 0, "the memory has no effect"
    assert not gradients["0.unread"].any()


def test_an_evaluation_has_the_losses_of_all_stages() -> None:
    found: list[dict[str, float]] = run_distributed(evaluate, 4)
    assert added(found) == pytest.approx(in_one_process()[0], rel=1e-6)
    assert [sorted(losses) for losses in found] == [[], ["penalty"], ["penalty"], ["loss", "penalty"]]


def send_another_width() -> None:
    executor, engine = executor_of("1f1b", 1)
    if dist.get_rank() == 0:
        forward: Callable[..., Any] = engine.forward

        def widened(stage: int, inputs: dict[str, Tensor], microbatch: Microbatch) -> StageOutput:
            activations, losses = forward(stage, inputs, microbatch)
            return StageOutput(activations | {"hidden": activations["hidden"].T}, losses)

        engine.forward = widened
        with pytest.raises(ValueError, match="the link carries"):
            executor.run(SCHEDULES["1f1b"](0, executor.placement, MICROBATCHES), microbatches())


def test_activations_that_are_not_those_of_the_edge_are_refused() -> None:
    run_distributed(send_another_width, 4)
