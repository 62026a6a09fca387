"""Vocabulary-parallel cross-entropy: the logits are neither gathered over the ranks nor copied whole to fp32.

The ranks exchange only three numbers per token: the maximum, the sum of exponentials and the target's logit
(Megatron-LM, arXiv:1909.08053, section 3). Legend: N tokens, V local columns.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.collectives import gather_from_group

# On a CPU the fp32 copy of a chunk of rows fits into a core's cache; an accelerator is faster with larger chunks.
CPU_CHUNK_ELEMENTS = 1 << 18
ACCELERATOR_CHUNK_ELEMENTS = 1 << 26


def _row_chunks(x_NV: Tensor) -> range:
    budget = CPU_CHUNK_ELEMENTS if x_NV.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    return range(0, x_NV.shape[0], max(1, budget // max(1, x_NV.shape[1])))


def _row_peak(x_NV: Tensor) -> Tensor:
    if x_NV.shape[1] == 0:  # a rank may hold padding alone
        return x_NV.new_full((x_NV.shape[0],), float("-inf"), dtype=torch.float32)
    return x_NV.amax(dim=1).float()


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, first_id: int, columns: int, group: TensorGroup
    ) -> Tensor:
        local_N = targets_N - first_id
        mine_N = (local_N >= 0) & (local_N < columns)
        local_N = local_N.masked_fill(~mine_N, 0)
        target_logit_N = logits_NV.gather(1, local_N[:, None])[:, 0].float().masked_fill(~mine_N, 0.0)
        peak_N = _row_peak(logits_NV[:, :columns])
        if group.size > 1:
            dist.all_reduce(peak_N, op=dist.ReduceOp.MAX, group=group.process_group)

        # The exponentials overwrite the logits, which are not needed any more: the backward of a matrix product
        # does not read its output. They lie in [0, 1], so the precision of the logits is enough.
        total_N = torch.empty_like(peak_N)
        chunks = _row_chunks(logits_NV)
        for start in chunks:
            rows = slice(start, start + chunks.step)
            exponentials = logits_NV[rows].float().sub_(peak_N[rows, None]).exp_()
            exponentials[:, columns:] = 0.0
            torch.sum(exponentials, dim=1, out=total_N[rows])
            if logits_NV.dtype != torch.float32:  # otherwise they were computed in place
                logits_NV[rows] = exponentials
        sums_2N = torch.stack((total_N, target_logit_N))
        if group.size > 1:
            dist.all_reduce(sums_2N, group=group.process_group)
        total_N, target_logit_N = sums_2N
        ctx.exponentials, ctx.chunks = logits_NV, chunks
        ctx.save_for_backward(total_N, local_N, mine_N)
        return total_N.log() + peak_N - target_logit_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        total_N, local_N, mine_N = ctx.saved_tensors
        grad_N = grad_outputs[0]
        probabilities_NV, chunks = ctx.exponentials, ctx.chunks
        scale_N = grad_N / total_N
        for start in chunks:
            rows = slice(start, start + chunks.step)
            scaled = probabilities_NV[rows].float().mul_(scale_N[rows, None])
            scaled.scatter_add_(1, local_N[rows, None], -(grad_N * mine_N)[rows, None])
            if probabilities_NV.dtype != torch.float32:
                probabilities_NV[rows] = scaled
        ctx.exponentials = None
        return probabilities_NV, None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, *, first_id: int = 0, vocab_size: int | None = None, group: TensorGroup
) -> Tensor:
    """Return the cross-entropy of each token in nats, fp32, the same on every rank.

    `logits` ``[..., V]`` holds this rank's columns, for the token ids from `first_id` on, in any floating precision.
    It is *overwritten*, with the exponentials and then with the gradient. `targets` ``[...]`` holds global ids.
    Columns of ids from `vocab_size` on are padding and are ignored.
    """
    columns = logits.shape[-1]
    if vocab_size is not None:
        columns = max(0, min(columns, vocab_size - first_id))
    losses: Tensor = _VocabParallelCrossEntropy.apply(  # pyright: ignore[reportAssignmentType]
        logits.flatten(0, -2), targets.flatten(), first_id, columns, group
    )
    return losses.view(targets.shape)


@dataclass(frozen=True, slots=True)
class VocabParallelLogits:
    """Logits with the vocabulary divided over a tensor group: `local` ``[..., V]`` has the ids from `first_id` on.

    `local` may be in any floating precision. Columns of ids from `vocab_size` on are padding.
    """

    local: Tensor
    first_id: int
    vocab_size: int
    group: TensorGroup

    def cross_entropy(self, targets: Tensor) -> Tensor:
        """Return the cross-entropy ``[...]`` of each target in nats, fp32. Call it last: it *overwrites* the logits."""
        return vocab_parallel_cross_entropy(
            self.local, targets, first_id=self.first_id, vocab_size=self.vocab_size, group=self.group
        )

    def gather(self) -> Tensor:
        """All-gather the logits over the vocabulary: return a copy ``[..., vocab_size]``, fp32."""
        return gather_from_group(self.local, self.group)[..., : self.vocab_size].to(torch.float32, copy=True)
