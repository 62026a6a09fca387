"""The weights of a model on this rank, and the loop that continues prompts with them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megalite.generation.request import Job, Sampling
from megalite.generation.sampling import choose
from megalite.generation.sequence import Continuation
from megalite.model.kernel_choice import choose_kernels
from megalite.model.kv_cache import KVCache
from megalite.model.load import load_stage
from megalite.model.precision import DTYPES
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup


class Generator:
    """A model in memory. The ranks of a tensor group each hold a share and make the same calls with the same prompts:
    every one of them sees all logits, chooses the same tokens and so needs to be told none."""

    def __init__(self, stage: Stage, device: torch.device, sampling: Sampling) -> None:
        self.stage, self._device, self._sampling = stage, device, sampling

    @torch.inference_mode()
    def run(self, batch: Sequence[Continuation], hear: Callable[[Continuation, str], object]) -> None:
        """Continue prompts together until each has ended.

        `hear` is told of every token of every row, with the text that it made certain. A row that has ended leaves
        the batch and costs no more.
        """
        started = time.perf_counter()
        rows = list(batch)
        cache = KVCache([len(row.prompt_ids) for row in rows], num_layers=len(self.stage.layers), device=self._device)
        ids_BS = self._filled_up([row.prompt_ids for row in rows])
        while rows:
            logits_BV = self.stage.next_logits(ids_BS, cache)
            tokens = choose(logits_BV, [row.draws.random() for row in rows], self._sampling)
            for row, token in zip(rows, tokens, strict=True):
                piece = row.take(token)
                row.seconds = time.perf_counter() - started
                hear(row, piece)
            going = [at for at, row in enumerate(rows) if row.reason is None]
            if 0 < len(going) < len(rows):
                cache.select_rows(going)
            rows = [rows[at] for at in going]
            ids_BS = self._filled_up([[tokens[at]] for at in going])

    def _filled_up(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return rows of token ids as ``[B, S]``, the shorter ones filled up on the right with what nobody reads."""
        width = max(map(len, rows), default=0)
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self._device)


def load_generator(
    job: Job, group: TensorGroup, device: torch.device, progress: Callable[[int, int], None] | None = None
) -> Generator:
    """Read this rank's share of a job's weights; `progress` is told the bytes read and the bytes in all."""
    model = job.weights.model
    dtype = DTYPES[job.precision]
    group = replace(group, kernels=choose_kernels(device, dtype, attention="fused"))
    stage = Stage(model, range(model.num_hidden_layers), index=0, num_stages=1, group=group)
    # Before the weights come: they are rounded one by one, and never all in memory twice.
    stage.to(device=device, dtype=dtype)
    stage.eval()
    load_stage(stage, job.weights, progress)
    return Generator(stage, device, job.sampling)
