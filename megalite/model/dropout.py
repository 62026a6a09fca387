"""Stateless dropout (arXiv:1207.0580): each mask is a function of seed, sample, layer and position.

Every token and every site has a key of two words: the first two words of `counter_random.philox` of the run's seed and

| key of   | counter                                                                      |
|----------|------------------------------------------------------------------------------|
| a token  | position in its row; sample, low word; sample, high word; 0                  |
| a site   | number of the site in its layer; number of the layer, from 1; 0; 1           |

`sample` is the row's number in the sample order of the run. The sites of a layer are 0, after attention; 1, after the
MLP; and 2 + h, the attention probabilities of head h of the whole model. The embedding is site 0 of layer 0. The key of
a token and a site is the exclusive or of both keys. With it `counter_random.random_below` draws one number for each
feature of the token's hidden state, or for each key position in its row that the token attends to.

So the masks are the same in every layout, microbatch size and recomputation, and on every device. A rank draws the
masks of its heads and tokens alone.

Legend for shapes: B rows, S tokens of a row, H hidden, T tokens of a rank's share, N local heads, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from megalite.kernels.counter_random import WORD, philox, random_below
from megalite.model.config import ModelConfig

SITES = {"embedding": 0, "attention": 0, "mlp": 1}
SCORES = 2
"""The site of the attention probabilities of head 0."""


@dataclass(frozen=True, slots=True)
class DropoutStreams:
    """The dropout masks of one training microbatch, for one layer (`for_layer`) or for all."""

    token_keys: Tensor
    """int32 ``[2, B, S]``"""
    site_keys: Tensor
    """int32 ``[2, L + 1, 2 + heads]``, or of one layer ``[2, 2 + heads]``"""
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    token_share: tuple[int, int] = (0, 1)
    """(rank, size): with sequence parallelism, hidden states are this even share of the B*S tokens."""

    @classmethod
    def of(
        cls, model: ModelConfig, seed: int, samples: Sequence[int], length: int, device: torch.device
    ) -> Self | None:
        """Return the streams of rows of `length` tokens, of these samples; None where the model has no dropout."""
        if not (model.hidden_dropout or model.attention_dropout):
            return None
        tokens = _keys(seed, torch.arange(length), torch.tensor(samples)[:, None], 0, device)
        layers = torch.arange(model.num_hidden_layers + 1)
        sites = _keys(seed, torch.arange(SCORES + model.num_attention_heads), layers[:, None], 1, device)
        return cls(tokens, sites, model.hidden_dropout, model.attention_dropout)

    def for_layer(self, number: int | None) -> Self:
        """Return the masks of one layer, by its number in the model; None: those of the embedding."""
        return replace(self, site_keys=self.site_keys[:, 0 if number is None else number + 1])

    def hidden(self, x: Tensor, site: str) -> Tensor:
        """Apply dropout to hidden states ``[B, S, H]``, or to the share ``[1, T, H]``, and scale the kept elements."""
        if not self.hidden_dropout:
            return x
        rank, size = self.token_share
        keys = self.token_keys.flatten(1).chunk(size, dim=1)[rank] ^ self.site_keys[:, SITES[site], None]
        keep_mask = random_below(keys, 0, x.shape[-1], 1 - self.hidden_dropout).view(x.shape)
        return x * keep_mask * (1 / (1 - self.hidden_dropout))

    def scores(self, heads: range) -> "AttentionDropout | None":
        """Return the dropout of attention probabilities for a rank's query heads; None where its rate is 0."""
        if not self.attention_dropout:
            return None
        head_keys = self.site_keys[:, SCORES + heads.start : SCORES + heads.stop]
        return AttentionDropout(self.token_keys, head_keys, 1 - self.attention_dropout)


@dataclass(frozen=True, slots=True)
class AttentionDropout:
    """The dropout of the attention probabilities of one layer, for the query heads of one rank and rows of tokens."""

    token_keys: Tensor
    """int32 ``[2, B, S]``"""
    head_keys: Tensor
    """int32 ``[2, N]``"""
    keep: float
    """The probability that an element is kept."""
    first: int = 0
    """The position in its row of the first token."""

    def span(self, row: int, first: int, length: int) -> Self:
        """Return the dropout of `length` tokens of one row, attention among them alone."""
        return replace(self, token_keys=self.token_keys[:, row : row + 1, first : first + length], first=first)

    def apply(self, probabilities: Tensor, start: int) -> Tensor:
        """Drop and scale probabilities ``[B * N, queries, keys]``, of queries from `start` on over the first keys."""
        queries, keys = probabilities.shape[1:]
        of_queries = self.token_keys[:, :, None, start : start + queries]
        drawn = random_below(of_queries ^ self.head_keys[:, None, :, None], self.first, keys, self.keep)
        return probabilities * drawn.flatten(0, 1) * (1 / self.keep)


def _keys(seed: int, place: Tensor, number: Tensor, kind: int, device: torch.device) -> Tensor:
    """Return the keys of broadcast int64 tensors, int32 ``[2, ...]``, computed on the host and copied to the device."""
    counter = torch.broadcast_tensors(place, number & WORD, number >> 32 & WORD, torch.tensor(kind))
    keys = torch.stack(philox(counter, seed)[:2])
    return (keys - ((keys >> 31) << 32)).to(torch.int32).to(device, non_blocking=True)
