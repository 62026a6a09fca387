"""Stateless dropout (arXiv:1207.0580): each mask is a function of seed, sample, layer and position.

Each mask is drawn with a separate generator. Its seed is the first 8 bytes, as a little-endian unsigned number, of
blake2b over ``"{seed} {sample} {site} {position}"``. An element is kept where ``torch.rand`` in fp32 is below 1 - p:

| mask          | site                      | position                       | shape of one draw                  |
|---------------|---------------------------|--------------------------------|------------------------------------|
| hidden states | ``embedding``             | number of a block of 64 tokens | ``[64, H]``                        |
|               | ``layers.3.attention``    |                                |                                    |
|               | ``layers.3.mlp``          |                                |                                    |
| attention     | ``layers.3.scores``       | ``{head} {start}``             | ``[L, L]``, queries by keys        |

`sample` is the row's number in the sample order of the run. `head` is the number of a head in the whole model. A
document of L tokens begins at token `start` of its row; a row that is not packed is one document. So the masks are the
same in every layout, microbatch size and recomputation, and a rank draws little more than the masks of its heads and
tokens.

Legend for shapes: B rows, S tokens of a row, H hidden, T tokens of a rank's share, N local heads, L tokens of a
document.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Self

import torch
from torch import Tensor

from megalite.model.config import ModelConfig

BLOCK = 64
"""Number of tokens whose hidden states share one draw."""


@dataclass(frozen=True, slots=True)
class DropoutStreams:
    """The dropout masks of one training microbatch, whose rows are these samples in the run's order."""

    seed: int
    samples: tuple[int, ...]
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    token_share: tuple[int, int] = (0, 1)
    """(rank, size): with sequence parallelism, hidden states are this even share of the B*S tokens."""
    prefix: str = ""
    """The prefix of sites, such as ``layers.3.``."""

    @classmethod
    def of(cls, model: ModelConfig, seed: int, samples: tuple[int, ...]) -> Self | None:
        """Return the streams of a microbatch of these samples; None where the model has no dropout."""
        if not (model.hidden_dropout or model.attention_dropout):
            return None
        return cls(seed, samples, model.hidden_dropout, model.attention_dropout)

    def for_layer(self, name: str) -> Self:
        """Return the same streams for the sites of one layer."""
        return replace(self, prefix=f"{name}.")

    def hidden(self, x: Tensor, site: str) -> Tensor:
        """Apply dropout to hidden states ``[B, S, H]``, or to the share ``[1, T, H]``, and scale the kept elements."""
        if not self.hidden_dropout:
            return x
        rank, size = self.token_share
        count = x.shape[:-1].numel()
        length = count * size // len(self.samples)
        tokens = range(rank * count, (rank + 1) * count)
        keep_mask = self._hidden_mask(site, tokens, length, x.shape[-1], x.device).view(x.shape)
        return x * keep_mask * (1 / (1 - self.hidden_dropout))

    def scores(self, heads: range) -> "AttentionDropout | None":
        """Return the dropout of attention probabilities for a rank's query heads; None where its rate is 0."""
        return AttentionDropout(self, heads) if self.attention_dropout else None

    def _hidden_mask(self, site: str, tokens: range, length: int, width: int, device: torch.device) -> Tensor:
        """Return the mask ``[T, H]`` of a range of tokens, True where an element is kept; rows have `length` tokens."""
        draw, masks, token = MaskGenerator(device, 1 - self.hidden_dropout), [], tokens.start
        while token < tokens.stop:
            row, position = divmod(token, length)
            block, begin = divmod(position, BLOCK)
            end = min(BLOCK, begin + tokens.stop - token, length - block * BLOCK)
            mask = draw((BLOCK, width), f"{self.seed} {self.samples[row]} {self.prefix}{site} {block}")
            masks.append(mask[begin:end])
            token += end - begin
        return torch.cat(masks)


@dataclass(frozen=True, slots=True)
class AttentionDropout:
    """The dropout of the attention probabilities of one layer, for the query heads of one rank."""

    streams: DropoutStreams
    heads: range

    @property
    def scale(self) -> float:
        """The factor of the probabilities that are kept."""
        return 1 / (1 - self.streams.attention_dropout)

    def keep_mask(self, documents: Sequence[tuple[int, int]], length: int, device: torch.device) -> Tensor:
        """Return ``[documents * N, L, L]``, True where a score is kept, for documents (row, start) of `length`."""
        streams = self.streams
        draw = MaskGenerator(device, 1 - streams.attention_dropout)
        keys = (
            f"{streams.seed} {streams.samples[row]} {streams.prefix}scores {head} {start}"
            for row, start in documents
            for head in self.heads
        )
        return torch.stack([draw((length, length), key) for key in keys])


class MaskGenerator:
    """Draws masks on a device, True with probability `keep`, as a function of a key; the same in every precision."""

    def __init__(self, device: torch.device, keep: float) -> None:
        self._generator, self._keep = torch.Generator(device), keep

    def __call__(self, shape: tuple[int, int], key: str) -> Tensor:
        digest = blake2b(key.encode(), digest_size=8).digest()
        # torch takes a seed of 64 bits; its CPU generator uses the lower 32.
        self._generator.manual_seed(int.from_bytes(digest, "little"))
        return torch.rand(shape, device=self._generator.device, generator=self._generator) < self._keep
