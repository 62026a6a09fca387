"""The ends of the model: the embedding of the first stage and the head of the last."""

import torch
from torch import Tensor, nn

from megalite.model.config import ModelConfig
from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.collectives import local_tokens
from megalite.tensor_parallel.layers import LinearModule, VocabParallelEmbedding
from megalite.tensor_parallel.linear import linear


class Embedding(nn.Module):
    """Embedding of token ids ``[B, S]`` into the residual stream ``[B, S, H]``, with `positions` learned positions.

    With sequence parallelism, the residual stream is this rank's share, ``[1, B*S / size, H]``.
    """

    def __init__(self, config: ModelConfig, group: TensorGroup, *, positions: int = 0) -> None:
        super().__init__()
        self.group = group
        self.tokens = VocabParallelEmbedding(_vocab_size(config), config.hidden_size, group=group)
        self.positions = None
        if positions:  # without torch's own initialisation, which imports much on the meta device
            table = torch.empty(positions, config.hidden_size)
            self.positions = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, ids_BS: Tensor, positions_BS: Tensor | None = None) -> Tensor:
        x_BSH = self.tokens(ids_BS)
        if self.positions is not None:
            if positions_BS is None:
                positions_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device)
            if self.group.sequence_parallel:
                positions_BS = local_tokens(positions_BS.expand_as(ids_BS), self.group)
            x_BSH = x_BSH + self.positions(positions_BS)
        return x_BSH


class Head(LinearModule):
    """Projection of hidden states ``[..., H]`` to the logits ``[..., V]`` of this rank's ids, in their precision.

    The vocabulary is divided over the group as in the embedding. `tied` is the embedding's table where this rank holds
    both, which then share the parameter.
    """

    def __init__(self, config: ModelConfig, group: TensorGroup, *, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.group, self.vocab_size = group, _vocab_size(config)
        table = VocabParallelEmbedding(self.vocab_size, config.hidden_size, group=group)
        self.first_id = table.first_id
        self.shard_specs = table.shard_specs
        self.weight = table.weight if tied is None else tied

    def forward(self, x: Tensor) -> Tensor:
        kernels, weight_grad_deferral = self.group.kernels, self.weight_grad_deferral
        return linear(
            x, self.weight, kernels=kernels, input_group=self.group, weight_grad_deferral=weight_grad_deferral
        )


def _vocab_size(config: ModelConfig) -> int:
    assert config.vocab_size is not None  # resolved from the tokenizer before any model is built
    return config.vocab_size
