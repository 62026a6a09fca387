"""Dropout (arXiv:1207.0580) whose masks are a function of where they apply, never of what was drawn before.

A mask is drawn by a generator of its own, whose seed is the first 8 bytes, as a little-endian unsigned number, of
blake2b over ``"{seed} {sample} {site} {place}"``; what has an fp32 number of ``torch.rand`` below 1 - p stays:

| mask          | site                      | place                          | drawn at once                      |
|---------------|---------------------------|--------------------------------|------------------------------------|
| hidden states | ``embedding``             | number of a block of 64 tokens | ``[64, H]``                        |
|               | ``layers.3.attention``    |                                |                                    |
|               | ``layers.3.mlp``          |                                |                                    |
| attention     | ``layers.3.scores``       | ``{head} {start}``             | ``[L, L]``, queries by keys        |

`sample` is the row's number in the order of the run. A head is counted over the whole model, and a document of L tokens
begins at token `start` of its row; a row that is not packed is one document. So every layout, microbatch size and
recomputation has the same masks, and a rank draws little more than those of its own heads and tokens.

Legend for shapes: B rows, S tokens of a row, H hidden, T tokens of a rank's share, N local heads, L tokens of a
document.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Self

import torch
from torch import Tensor

from megalite.config import ModelConfig

BLOCK = 64
"""Tokens of a row whose hidden states have one draw."""


@dataclass(frozen=True, slots=True)
class DropoutStreams:
    """The dropout of one microbatch of training, whose rows have these numbers in the run's order."""

    seed: int
    samples: tuple[int, ...]
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    share: tuple[int, int] = (0, 1)
    """(rank, size): hidden states are this even stretch of the B*S tokens in turn, as under sequence parallelism."""
    prefix: str = ""
    """What sites are named under, such as ``layers.3.``."""

    @classmethod
    def of(cls, model: ModelConfig, seed: int, samples: tuple[int, ...]) -> Self | None:
        """Return the streams of a microbatch of these samples; None where the model drops nothing."""
        if not (model.hidden_dropout or model.attention_dropout):
            return None
        return cls(seed, samples, model.hidden_dropout, model.attention_dropout)

    def under(self, name: str) -> Self:
        """Return the same streams for the sites of one layer."""
        return replace(self, prefix=f"{name}.")

    def hidden(self, x: Tensor, site: str) -> Tensor:
        """Drop hidden states ``[B, S, H]``, or the share ``[1, T, H]``, and scale those that stay."""
        if not self.hidden_dropout:
            return x
        rank, size = self.share
        tokens = x.shape[:-1].numel()
        length = tokens * size // len(self.samples)
        stretch = range(rank * tokens, (rank + 1) * tokens)
        kept = self._kept_hidden(site, stretch, length, x.shape[-1], x.device).view(x.shape)
        return x * kept * (1 / (1 - self.hidden_dropout))

    def scores(self, heads: range) -> "ScoreDropout | None":
        """Return the dropout of attention's probabilities for a rank's query heads; None where nothing is dropped."""
        return ScoreDropout(self, heads) if self.attention_dropout else None

    def _kept_hidden(self, site: str, stretch: range, length: int, width: int, device: torch.device) -> Tensor:
        """Return ``[T, H]``, true where a token of the stretch keeps its hidden states; rows are `length` tokens."""
        draws, kept, token = Draws(device, 1 - self.hidden_dropout), [], stretch.start
        while token < stretch.stop:
            row, place = divmod(token, length)
            block, begin = divmod(place, BLOCK)
            end = min(BLOCK, begin + stretch.stop - token, length - block * BLOCK)
            drawn = draws((BLOCK, width), f"{self.seed} {self.samples[row]} {self.prefix}{site} {block}")
            kept.append(drawn[begin:end])
            token += end - begin
        return torch.cat(kept)


@dataclass(frozen=True, slots=True)
class ScoreDropout:
    """The dropout of the attention probabilities of one layer, for the query heads of one rank."""

    streams: DropoutStreams
    heads: range

    @property
    def scale(self) -> float:
        """What the probabilities that stay are multiplied by."""
        return 1 / (1 - self.streams.attention_dropout)

    def kept(self, documents: Sequence[tuple[int, int]], length: int, device: torch.device) -> Tensor:
        """Return ``[documents * N, L, L]``, true where a probability stays, of documents (row, start) of `length`."""
        streams = self.streams
        draws = Draws(device, 1 - streams.attention_dropout)
        keys = (
            f"{streams.seed} {streams.samples[row]} {streams.prefix}scores {head} {start}"
            for row, start in documents
            for head in self.heads
        )
        return torch.stack([draws((length, length), key) for key in keys])


class Draws:
    """Masks on a device, true with probability `keep`, each by its key alone; the same in every precision."""

    def __init__(self, device: torch.device, keep: float) -> None:
        self._generator, self._keep = torch.Generator(device), keep

    def __call__(self, shape: tuple[int, int], key: str) -> Tensor:
        digest = blake2b(key.encode(), digest_size=8).digest()
        # torch takes 64 bits, of which its CPU generator uses the lower 32.
        self._generator.manual_seed(int.from_bytes(digest, "little"))
        return torch.rand(shape, device=self._generator.device, generator=self._generator) < self._keep
