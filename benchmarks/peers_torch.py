"""Plain torch as a contender: a loop of a page, and torch's own data, tensor and pipeline parallelism."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from llama import Llama, adamw
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from workload import TIMEOUT, Contender, Job


def join(rank: int, world_size: int, port: int) -> None:
    """Form the default process group on gloo; nothing to form for one rank."""
    if world_size > 1:
        at = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=at, rank=rank, world_size=world_size, timeout=TIMEOUT)


class MasterWeights:
    """fp32 masters of a module that is then turned to the job's dtype, their AdamW and the clipping of their gradients.

    Gradients are those of a mean over the whole batch. `shared` are the parameters of which every rank of `group` holds
    a copy; all others differ from rank to rank, so that their norms add up.
    """

    def __init__(
        self,
        module: nn.Module,
        job: Job,
        group: dist.ProcessGroup | None = None,
        shared: Iterable[nn.Parameter] = (),
    ) -> None:
        held_by_all = {id(parameter) for parameter in shared}
        self.shared = [id(parameter) in held_by_all for parameter in module.parameters()]
        self.group, self.clipping, self.module = group, job.gradient_clipping, module
        if job.dtype == "fp32":
            self.masters = list(module.parameters())
        else:
            self.masters = [nn.Parameter(local(parameter).detach().clone()) for parameter in module.parameters()]
        module.to(job.torch_dtype)
        self.optimizer = adamw(self.masters, job)

    @torch.no_grad()
    def step(self) -> None:
        """Clip, update the masters, round them into the module."""
        weights = list(self.module.parameters())
        for master, weight in zip(self.masters, weights, strict=True):
            assert weight.grad is not None
            master.grad = local(like(weight.grad, weight)).float()
        clip_grads_with_norm_(self.masters, self.clipping, self.norm())
        self.optimizer.step()
        for master, weight in zip(self.masters, weights, strict=True):
            local(weight).copy_(master)
        self.module.zero_grad()

    def norm(self) -> Tensor:
        """Norm of the whole gradient, over the ranks of the group."""
        pairs = [(master.grad, shared) for master, shared in zip(self.masters, self.shared, strict=True)]
        own = get_total_norm([grad for grad, shared in pairs if grad is not None and not shared]).square()
        if self.group is not None:
            dist.all_reduce(own, group=self.group)
        return (own + get_total_norm([grad for grad, shared in pairs if grad is not None and shared]).square()).sqrt()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(grad: Tensor, weight: Tensor) -> Tensor:
    """A gradient laid out over the ranks as its weight is: DTensor leaves that of the embedding whole."""
    if isinstance(grad, DTensor) and isinstance(weight, DTensor):
        return grad.redistribute(placements=weight.placements)
    return grad


class PlainTorch(Contender):
    """A training loop of a page: bf16 weights and gradients, fp32 master weights, DDP where there are two ranks."""

    name = "torch"
    layouts = ("one", "dp2")
    description = "plain torch, bf16 weights with fp32 masters; DistributedDataParallel at dp2"
    model: nn.Module

    def setup(self, rank: int, world_size: int, port: int) -> None:
        join(rank, world_size, port)
        self.rank, self.steps = rank, 0
        self.build()

    def build(self) -> None:
        """Make the model and its optimizer."""
        module = Llama(self.job)
        self.optimizer = MasterWeights(module, self.job)
        parallel = self.layout.size("data") > 1
        self.model = DistributedDataParallel(module, gradient_as_bucket_view=True) if parallel else module

    def step(self) -> float | None:
        losses = [self.forward_backward(batch, last) for batch, last in self.batches()]
        self.steps += 1
        self.optimizer.step()
        return sum(loss.item() for loss in losses) / len(losses)

    def batches(self) -> Iterator[tuple[tuple[Tensor, Tensor], bool]]:
        """This step's micro-batches, each with whether it is the last."""
        data_rank, data_size = (self.rank, self.layout.size("data")) if self.layout.size("data") > 1 else (0, 1)
        count = self.job.num_micro_batches(data_size)
        for index, batch in enumerate(self.job.micro_batches(self.steps, data_rank, data_size), start=1):
            yield batch, index == count

    def forward_backward(self, batch: tuple[Tensor, Tensor], last: bool) -> Tensor:
        """Accumulate the gradients of one micro-batch, reduced over the ranks with the last one."""
        unsynchronised: AbstractContextManager[None] = nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not last:
            unsynchronised = self.model.no_sync()
        with unsynchronised:
            loss = self.model(*batch)
            (loss / self.job.num_micro_batches(self.layout.size("data"))).backward()
        return loss.detach()

    def teardown(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class CompiledTorch(PlainTorch):
    """The same loop with the whole model under torch.compile."""

    name = "torch-compiled"
    layouts = ("one",)
    description = "plain torch, as above, the whole model compiled by torch.compile"

    def build(self) -> None:
        super().build()
        self.model.compile()


class AutocastTorch(PlainTorch):
    """fp32 weights, computed with under torch's own mixed precision."""

    name = "torch-autocast"
    layouts = ("one",)
    description = "plain torch, fp32 weights under torch.autocast"

    def build(self) -> None:
        self.model = Llama(self.job)
        self.adamw = adamw(self.model.parameters(), self.job)

    def step(self) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.job.dtype == "bf16"):
            losses = [self.forward_backward(batch, last) for batch, last in self.batches()]
        self.steps += 1
        nn.utils.clip_grad_norm_(self.model.parameters(), self.job.gradient_clipping)
        self.adamw.step()
        self.adamw.zero_grad()
        return sum(loss.item() for loss in losses) / len(losses)


class DTensorTorch(PlainTorch):
    """The plain loop over a model that ``parallelize_module`` has sharded, the logits and their loss too."""

    name = "torch-dtensor"
    layouts = ("tp2",)
    description = "plain torch, as above, sharded by torch's parallelize_module with loss_parallel"

    def build(self) -> None:
        mesh = init_device_mesh("cpu", (self.layout.size("tensor"),))
        module = Llama(self.job)
        plan = {f"layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {f"layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        plan["lm_head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        rows = {name: RowwiseParallel() for name in ("layers.*.self_attn.o_proj", "layers.*.mlp.down_proj")}
        rows["embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(module, mesh, {**plan, **rows})
        shared = [parameter for parameter in module.parameters() if not isinstance(parameter, DTensor)]
        self.optimizer = MasterWeights(module, self.job, mesh.get_group(), shared)
        self.model = module

    def forward_backward(self, batch: tuple[Tensor, Tensor], last: bool) -> Tensor:
        with loss_parallel():
            return local(super().forward_backward(batch, last))
