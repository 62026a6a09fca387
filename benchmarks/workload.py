"""The job that every contender trains, the layouts it is trained at, and what a contender is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import torch
from torch import Tensor

from megalite.parallel.layout import ParallelLayout

LAYOUTS: dict[str, ParallelLayout] = {
    "one": ParallelLayout(tensor=1, pipeline=1, data=1),
    "tp2": ParallelLayout(tensor=2, pipeline=1, data=1),
    "pp2": ParallelLayout(tensor=1, pipeline=2, data=1),
    "dp2": ParallelLayout(tensor=1, pipeline=1, data=2),
}
TIMEOUT = timedelta(minutes=3)
"""How long a rank waits for another before it gives up; no step takes that long."""

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Job:
    """A Llama and how it is trained; the defaults are the job of every published number."""

    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    intermediate_size: int = 1408
    vocab_size: int = 8192
    tie_word_embeddings: bool = False
    sequence_length: int = 512
    global_batch_size: int = 8
    micro_batch_size: int = 2
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0
    dtype: str = "bf16"
    seed: int = 1234

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.global_batch_size * self.sequence_length

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the forward and backward compute in."""
        return DTYPES[self.dtype]

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, a tied table counted once."""
        hidden, vocabulary = self.hidden_size, self.vocab_size
        layer = 4 * hidden**2 + 3 * hidden * self.intermediate_size + 2 * hidden
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * layer + hidden + tables * vocabulary * hidden

    @property
    def flops_per_token(self) -> int:
        """Floating point operations of one token, forward and backward, causal attention counted at half."""
        hidden, layers = self.hidden_size, self.num_hidden_layers
        products = layers * (4 * hidden**2 + 3 * hidden * self.intermediate_size) + hidden * self.vocab_size
        return 6 * products + 6 * layers * hidden * self.sequence_length

    def batch(self, step: int) -> Tensor:
        """Token ids of one step, int64 [global_batch_size, sequence_length + 1].

        The ids follow Zipf's law, drawn from (seed, step) alone: all contenders read the same, and a loss has
        something to fall to.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        cumulative = (1.0 / torch.arange(1, self.vocab_size + 1, dtype=torch.float64)).cumsum(0)
        draws = torch.rand(self.global_batch_size, self.sequence_length + 1, dtype=torch.float64, generator=generator)
        return torch.searchsorted(cumulative, draws * cumulative[-1]).clamp_(max=self.vocab_size - 1)

    def micro_batches(self, step: int, data_rank: int = 0, data_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The inputs and labels, each [micro_batch_size, sequence_length], that one data-parallel rank trains on."""
        for rows in self.batch(step).chunk(data_size)[data_rank].split(self.micro_batch_size):
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def num_micro_batches(self, data_size: int = 1) -> int:
        """Micro-batches that one data-parallel rank accumulates in a step."""
        return self.global_batch_size // (self.micro_batch_size * data_size)


class Contender(ABC):
    """One program that trains the job at one layout; an instance lives in each rank's own process.

    The rank's process has `world_size` from the layout and the cores of the machine shared out among the ranks; it sets
    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and OMP_NUM_THREADS before torch is imported.
    """

    name: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]]
    description: ClassVar[str]
    environment: ClassVar[Mapping[str, str]] = {}
    """What the program itself would set for its ranks, on top of the above."""

    def __init__(self, job: Job, layout: str) -> None:
        self.job = job
        self.layout = LAYOUTS[layout]

    @abstractmethod
    def setup(self, rank: int, world_size: int, port: int) -> None:
        """Join the other ranks through 127.0.0.1:`port` and build model and optimizer."""

    @abstractmethod
    def step(self) -> float | None:
        """Train on the next global batch; the mean loss of this rank's share, None where this rank sees no loss."""

    def observe(self, what: str) -> object:
        """Train on the next global batch while looking at `what`; what was seen, as JSON takes it.

        Raises NotImplementedError where a contender cannot look at itself so.
        """
        raise NotImplementedError(f"{self.name} does not observe {what}")

    @abstractmethod
    def teardown(self) -> None:
        """Leave the other ranks."""
