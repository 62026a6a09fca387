"""torch.distributed.pipelining as a contender, under each of its schedules that megalite has too."""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from llama import Llama, cross_entropy
from peers_torch import MasterWeights, PlainTorch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from megalite.parallel.placement import Placement, Shape


class PipelineTorch(PlainTorch):
    """torch.distributed.pipelining under its 1F1B schedule, the layers parted evenly."""

    name = "torch-pipelining"
    layouts = ("pp2",)
    description = "plain torch, as above, under torch.distributed.pipelining's Schedule1F1B"
    schedule_class: ClassVar[type[Any]] = Schedule1F1B
    virtual_stages: ClassVar[int] = 1
    shape: ClassVar[Shape] = "loop"

    def build(self) -> None:
        placement = Placement(self.layout.size("pipeline"), self.virtual_stages, self.shape)
        parts = {stage: self.part(stage, placement.num_stages) for stage in placement.stages_of(self.rank)}
        self.optimizer = MasterWeights(nn.ModuleList(parts.values()), self.job, dist.group.WORLD)
        device, count = torch.device("cpu"), placement.num_stages
        stages = [PipelineStage(module, index, count, device) for index, module in parts.items()]
        held: Any = stages if self.virtual_stages > 1 else stages[0]  # schedules of one stage a rank take no list
        self.schedule = self.schedule_class(held, self.job.num_micro_batches(), loss_fn=cross_entropy)
        self.feeds, self.scores = 0 in parts, count - 1 in parts

    def part(self, stage: int, num_stages: int) -> nn.Sequential:
        """The layers of one stage, with the embedding on the first and the head on the last."""
        whole, each = Llama(self.job), self.job.num_hidden_layers // num_stages
        blocks = list(whole.layers)[stage * each :][:each]
        first, last = [whole.embed_tokens], [whole.norm, whole.lm_head]
        return nn.Sequential(*first * (stage == 0), *blocks, *last * (stage == num_stages - 1))

    def step(self) -> float | None:
        batch = self.job.batch(self.steps)
        losses: list[Tensor] = []
        inputs = [batch[:, :-1].contiguous()] if self.feeds else []
        targets = {"target": batch[:, 1:].contiguous(), "losses": losses} if self.scores else {}
        self.schedule.step(*inputs, **targets, return_outputs=False)
        self.steps += 1
        self.optimizer.step()
        return sum(loss.item() for loss in losses) / len(losses) if losses else None


class GPipeTorch(PipelineTorch):
    """The same under GPipe's schedule."""

    name = "torch-gpipe"
    description = "plain torch, as above, under torch.distributed.pipelining's ScheduleGPipe"
    schedule_class = ScheduleGPipe


class InterleavedTorch(PipelineTorch):
    """The same under interleaved 1F1B, two stages a rank."""

    name = "torch-interleaved"
    description = "plain torch, as above, under torch.distributed.pipelining's ScheduleInterleaved1F1B, 2 stages a rank"
    schedule_class = ScheduleInterleaved1F1B
    virtual_stages = 2


class ZeroBubbleTorch(PipelineTorch):
    """The same under ZB-V, two stages a rank."""

    name = "torch-zbv"
    description = "plain torch, as above, under torch.distributed.pipelining's ScheduleZBVZeroBubble, 2 stages a rank"
    schedule_class = ScheduleZBVZeroBubble
    virtual_stages = 2
    shape = "v"
