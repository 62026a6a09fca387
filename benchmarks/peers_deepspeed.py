"""DeepSpeed as a contender, driven as its own documentation drives it: the plain engine and the pipeline engine."""

import itertools
import logging
from typing import Any, ClassVar

import torch.distributed as dist
from llama import Block, Embedding, Head, Llama, RMSNorm, adamw, cross_entropy
from torch import Tensor, nn
from workload import TIMEOUT, Contender


class DeepSpeedContender(Contender):
    """What DeepSpeed's two engines share: the JSON, and peace on the console."""

    engine: Any
    zero_stage: ClassVar[int] = 1

    def initialize(self, module: nn.Module) -> None:
        """Build the engine by ``deepspeed.initialize``."""
        import deepspeed

        optimizer = adamw(module.parameters(), self.job)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self.config())

    def start_distributed(self) -> None:
        """Form DeepSpeed's process group, without the C++ build for inference that it starts on CPU by itself."""
        import deepspeed
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed("gloo", timeout=TIMEOUT)

    def config(self) -> dict[str, object]:
        """DeepSpeed's JSON for the job."""
        return {
            "train_batch_size": self.job.global_batch_size,
            "train_micro_batch_size_per_gpu": self.job.micro_batch_size,
            "gradient_accumulation_steps": self.job.num_micro_batches(self.layout.size("data")),
            "bf16": {"enabled": self.job.dtype == "bf16"},
            "zero_optimization": {"stage": self.zero_stage},
            "gradient_clipping": self.job.gradient_clipping,
            "steps_per_print": 1_000_000,
        }

    def teardown(self) -> None:
        self.engine.destroy()
        dist.destroy_process_group()


class DeepSpeedZero1(DeepSpeedContender):
    """A plain DeepSpeedEngine at ZeRO-1."""

    name = "deepspeed-zero1"
    layouts = ("one", "dp2")
    description = "DeepSpeedEngine, ZeRO-1"

    def setup(self, rank: int, world_size: int, port: int) -> None:
        self.rank, self.world_size, self.steps = rank, world_size, 0
        self.start_distributed()
        self.initialize(Llama(self.job))

    def step(self) -> float:
        losses: list[Tensor] = []
        for ids, labels in self.job.micro_batches(self.steps, self.rank, self.world_size):
            loss = self.engine(ids, labels)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        self.steps += 1
        return sum(loss.item() for loss in losses) / len(losses)


class DeepSpeedZero2(DeepSpeedZero1):
    """The same at ZeRO-2, whose gradients are reduced once a micro-batch."""

    name = "deepspeed-zero2"
    layouts = ("dp2",)
    description = "DeepSpeedEngine, ZeRO-2"
    zero_stage = 2


class DeepSpeedZero3(DeepSpeedZero1):
    """The same at ZeRO-3, whose weights are gathered for every layer."""

    name = "deepspeed-zero3"
    layouts = ("dp2",)
    description = "DeepSpeedEngine, ZeRO-3"
    zero_stage = 3


class DeepSpeedPipeline(DeepSpeedContender):
    """DeepSpeed's own PipelineEngine over its own PipelineModule, layers parted by their parameters (its default)."""

    name = "deepspeed-pipeline"
    layouts = ("pp2",)
    description = "DeepSpeed PipelineEngine (1F1B), ZeRO-1"

    def setup(self, rank: int, world_size: int, port: int) -> None:
        from deepspeed.pipe import PipelineModule

        self.start_distributed()
        module = PipelineModule(self.layers(), num_stages=self.layout.size("pipeline"), loss_fn=cross_entropy)
        self.initialize(module)
        self.data = itertools.chain.from_iterable(self.job.micro_batches(step) for step in itertools.count())

    def layers(self) -> list[object]:
        """The model as DeepSpeed's list of layers, built on the stage that owns them."""
        from deepspeed.pipe import LayerSpec, TiedLayerSpec

        job = self.job
        blocks = [LayerSpec(Block, job, index) for index in range(job.num_hidden_layers)]
        if not job.tie_word_embeddings:
            return [LayerSpec(Embedding, job), *blocks, LayerSpec(RMSNorm, job), LayerSpec(Head, job)]
        table = TiedLayerSpec("embedding", Embedding, job)
        return [
            table,
            *blocks,
            LayerSpec(RMSNorm, job),
            TiedLayerSpec("embedding", Embedding, job, forward_fn=Embedding.project),
        ]

    def step(self) -> float:
        return float(self.engine.train_batch(self.data))
