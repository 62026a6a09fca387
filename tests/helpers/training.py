"""Runs for tests: steps of a run file on real ranks, and the same steps in one process of plain torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from megalite.config import OptimizerSection
    from megalite.model.stage import Stage
    from megalite.planning.plan import Plan
    from megalite.training.trainer import Trainer
    from megalite.zero.engine import ZeroEngine

QUICKSTART_MODEL: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 688,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}

NARROW = ("model.hidden_size=64", "model.intermediate_size=176")
"""Overrides that leave that model's heads and layers, and a tenth of its arithmetic: for tests of anything else."""
TINY_MODEL = (
    "model.vocab_size=256",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=48",
    "data.sequence_length=24",
)
"""Overrides for the smallest model: for tests that compare every element, or start whole commands."""
FEW_TOKENS = 512
"""A vocabulary that still holds the made-up corpus's tokens; that model's own is half of its parameters."""


def resized(run_file: Path, **sizes: int) -> Path:
    """Give a run file other sizes of its model, where no override may: one that replaces the model has its own."""
    content = yaml.safe_load(run_file.read_text())
    content["model"] |= sizes
    run_file.write_text(yaml.safe_dump(content))
    return run_file


@dataclass(frozen=True)
class Trace:
    """Loss and gradient norm of each step."""

    losses: list[float]
    norms: list[float]

    def assert_close(self, expected: "Trace", relative: float) -> None:
        assert len(self.losses) == len(expected.losses)
        for step, pairs in enumerate(zip(self.losses, expected.losses, self.norms, expected.norms, strict=True), 1):
            loss, loss_expected, norm, norm_expected = pairs
            assert abs(loss / loss_expected - 1) <= relative, f"step {step}: loss {loss} is not {loss_expected}"
            assert abs(norm / norm_expected - 1) <= relative, f"step {step}: norm {norm} is not {norm_expected}"


def unchanged(plan: "Plan") -> "Plan":
    return plan


def build_trainer(
    path: str | Path,
    overrides: Sequence[str],
    on_save_point: Callable[[str], None] = lambda point: None,
    replan: "Callable[[Plan], Plan]" = unchanged,
) -> "Trainer":
    """Build this rank's trainer of a run file, inside the process group that the test formed.

    `on_save_point` hears of the points that a save passes; `replan` returns the plan to train in place of the file's.
    """
    from megalite.data.datasets import open_datasets
    from megalite.parallel.mesh import build_mesh, local_device
    from megalite.planning.plan import prepare
    from megalite.training.trainer import Trainer

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    plan = replan(prepare(Path(path), overrides, world_size))
    mesh = build_mesh(
        plan.layout, rank, device=local_device(0), timeout=timedelta(seconds=60), placement=plan.placement
    )
    return Trainer(plan, mesh, open_datasets(plan.config), on_save_point=on_save_point)


def train_rank(
    path: str, overrides: Sequence[str], replan: "Callable[[Plan], Plan]" = unchanged
) -> tuple[list[float], list[float]]:
    """Run all steps of a run file on this rank."""
    trainer = build_trainer(path, overrides, replan=replan)
    reports = [trainer.step(step) for step in range(1, trainer.config.train.steps + 1)]
    trainer.close()
    return [report.loss for report in reports], [report.outcome.grad_norm for report in reports]


class PlainLion(torch.optim.Optimizer):
    """Lion, line by line of algorithm 2 of arXiv:2302.06675."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                moment = self.state[weight].setdefault("m", torch.zeros_like(weight))
                update = torch.sign(beta1 * moment + (1 - beta1) * weight.grad)
                weight -= group["lr"] * (update + group["weight_decay"] * weight)
                moment.copy_(beta2 * moment + (1 - beta2) * weight.grad)


def plain_groups(model: "Stage", settings: "OptimizerSection") -> Iterator[dict[str, Any]]:
    """Freeze the parameters that the run file freezes, and yield a group for each of the others."""
    for placed in model.placed_parameters:
        parameter, name = placed.parameter, placed.shards[0].spec.name
        group = next((group for group in settings.groups if fnmatchcase(name, group.match)), None)
        decay = settings.weight_decay if group is None or group.weight_decay is None else group.weight_decay
        if group is not None and group.frozen:
            parameter.requires_grad_(False)
            continue
        scale = 1.0 if group is None or group.lr_scale is None else group.lr_scale
        yield {"params": [parameter], "weight_decay": decay if parameter.ndim > 1 else 0.0, "scale": scale}


def train_in_plain_torch(
    path: Path, overrides: Sequence[str], further_loss: "Callable[[Stage], Callable[[], Tensor]] | None" = None
) -> Trace:
    """Run the same steps without DeepSpeed, pipeline or ranks: torch's optimizer and clipping over one module.

    `further_loss` is called with the model, and what it returns gives a loss to add after each forward. Parameter
    groups are made here, a group a parameter, from the patterns of the run file.
    """
    from megalite.data.batch_schedule import BatchSchedule
    from megalite.data.collate import SampleRules
    from megalite.data.datasets import open_datasets
    from megalite.kernels.choice import Kernels
    from megalite.model.dropout import DropoutStreams
    from megalite.model.stage import Stage
    from megalite.optim.learning_rate import learning_rate
    from megalite.parallel.tensor_group import TensorGroup
    from megalite.planning.plan import prepare
    from megalite.training.microbatches import to_device

    plan = prepare(path, overrides, 1)
    config, train = plan.config, plan.config.train
    group = TensorGroup(kernels=Kernels("native", train.cpu_attention or "written_out"))
    model = Stage(config.model, range(config.model.num_hidden_layers), index=0, num_stages=1, group=group)
    model.initialise(config.run.seed)
    penalty = further_loss(model) if further_loss else None
    groups = list(plain_groups(model, config.optimizer))
    optimizer = PlainLion if config.optimizer.name == "lion" else torch.optim.AdamW
    adamw = optimizer(groups, **config.optimizer.hyperparameters)
    datasets, schedule = open_datasets(config), BatchSchedule(train)
    rules = SampleRules.of(config, datasets.fim)
    losses, norms = [], []
    for step in range(1, train.steps + 1):
        batch = rules.microbatch(datasets.train, schedule.samples(step))
        weight = None if batch.loss_mask is None else 1 / batch.loss_mask.sum()
        length, device = config.data.sequence_length, torch.device("cpu")
        dropout = DropoutStreams.of(config.model, config.run.seed, schedule.samples(step), length, device)
        microbatch = to_device(batch, device, token_weight=weight, dropout=dropout)
        loss = model({}, microbatch=microbatch).losses["loss"]
        adamw.zero_grad()
        (loss + penalty() if penalty else loss).backward()
        # clip_grad_norm_ with its norm in double: over millions of elements fp32 on a CPU is off by 1e-4.
        norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
        nn.utils.clip_grads_with_norm_(model.parameters(), config.gradient_clipping, norm)
        norms.append(float(norm))
        for group in adamw.param_groups:
            group["lr"] = group["scale"] * learning_rate(step, train.steps, config.schedule, config.optimizer.lr)
        adamw.step()
        losses.append(float(loss.detach()))
    return Trace(losses, norms)


def zero_engine(trainer: "Trainer") -> "ZeroEngine":
    """Return the engine of a trainer as the engine on DeepSpeed that it is."""
    from megalite.zero.engine import ZeroEngine

    assert isinstance(trainer.engine, ZeroEngine)
    return trainer.engine


def after_the_backwards(trainer: "Trainer", act: Callable[[], None]) -> None:
    """Have `act` called in every step when its gradients are whole and not reduced yet."""
    run = trainer.executor.run

    def and_act(*args: Any, **settings: Any) -> Any:
        result = run(*args, **settings)
        act()
        return result

    trainer.executor.run = and_act  # type: ignore[method-assign]
