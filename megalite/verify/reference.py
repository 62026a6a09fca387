"""The reference of the parity check: one step in one process of plain torch, without DeepSpeed, pipeline or ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megalite.convert.open import open_weights
from megalite.data.batch_schedule import BatchSchedule
from megalite.data.collate import SampleMicrobatch, SampleRules
from megalite.data.datasets import Datasets
from megalite.kernels.choice import Kernels
from megalite.model.dropout import DropoutStreams
from megalite.model.load import load_stage
from megalite.model.loss import LOSS, loss_function
from megalite.model.stage import Stage
from megalite.parallel.regions import Region
from megalite.parallel.tensor_group import TensorGroup
from megalite.planning.plan import Plan
from megalite.training.microbatches import to_device


class Reference:
    """The first step's loss and gradients, by torch's autograd over the whole model in fp32, without an update.

    `loss` is the mean over the tokens of the global batch that count in the loss; `norm` is the gradient's global norm.
    """

    def __init__(self, plan: Plan, datasets: Datasets, device: torch.device, kernels: Kernels) -> None:
        """Compute loss and gradients, with the kernels of the compared layout, so that both round in the same way."""
        self._plan, self._device = plan, device
        model = _whole_model(plan, kernels).to(device)
        self._parameters = dict(_global_tensors(model))
        batch = list(self._microbatches(datasets))
        counted = sum(int(microbatch.loss_mask.sum()) for microbatch in batch if microbatch.loss_mask is not None)
        self.loss = 0.0
        for microbatch in batch:
            losses = self._losses(model, microbatch, len(batch), counted)
            sum(losses.values(), torch.zeros((), device=device)).backward()
            self.loss += float(losses[LOSS].detach().double())
        # In fp64: a sum over millions of elements in fp32 on a CPU is off by 1e-4.
        self.squares = {name: float(self.gradient(name).double().square().sum()) for name in self._parameters}
        """Square of each parameter's gradient norm, by global name."""
        self.replicated = frozenset(
            shard.spec.name
            for placed in model.placed_parameters
            for shard in placed.shards
            if "tensor" not in shard.spec.sharding
        )
        """Names of the tensors that every tensor rank holds whole."""
        self.norm = sum(self.squares.values()) ** 0.5

    def weight(self, name: str) -> Tensor:
        """Return a global tensor before the step."""
        parameter, region = self._parameters[name]
        return parameter.detach()[region.slices]

    def gradient(self, name: str) -> Tensor:
        """Return the gradient of a global tensor, before clipping."""
        parameter, region = self._parameters[name]
        held = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return held[region.slices]

    def _microbatches(self, datasets: Datasets) -> Iterator[SampleMicrobatch]:
        config = self._plan.config
        rules, size = SampleRules.of(config, datasets.fim), config.train.micro_batch_size
        samples = BatchSchedule(config.train).samples(1)
        for start in range(samples.start, samples.stop, size):
            yield rules.microbatch(datasets.train, range(start, start + size))

    def _losses(self, model: Stage, batch: SampleMicrobatch, microbatches: int, counted: int) -> dict[str, Tensor]:
        config, length = self._plan.config, batch.ids.shape[1]
        microbatch = to_device(
            batch,
            self._device,
            num_microbatches=microbatches,
            token_weight=1 / max(counted, 1),
            dropout=DropoutStreams.of(config.model, config.run.seed, batch.samples, length, self._device),
        )
        return model({}, microbatch=microbatch).losses


def _whole_model(plan: Plan, kernels: Kernels) -> Stage:
    config, group = plan.config, TensorGroup(kernels=kernels)
    layers, loss = range(config.model.num_hidden_layers), loss_function(config.train.loss)
    model = Stage(config.model, layers, index=0, num_stages=1, group=group, loss=loss)
    if config.init_from is None:
        model.initialise(config.run.seed)
    else:
        load_stage(model, open_weights(config.init_from))
    model.freeze(plan.frozen)
    return model


def _global_tensors(model: Stage) -> Iterator[tuple[str, tuple[nn.Parameter, Region]]]:
    """Yield each global tensor's name, the parameter that holds it, and its region there, without padding."""
    for placed in model.placed_parameters:
        for shard in placed.shards:
            yield shard.spec.name, (placed.parameter, shard.target)
