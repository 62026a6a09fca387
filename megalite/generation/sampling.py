"""Which token comes next: the likeliest, or one drawn from the likely ones.

Legend for shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalite.generation.request import Sampling


def choose(logits_BV: Tensor, drawn: Sequence[float], sampling: Sampling) -> list[int]:
    """Return a token a row: the likeliest at temperature 0, else the one that the row's number in [0, 1) falls on.

    The number is laid over the probabilities in the order of the vocabulary. In the order of probabilities two that
    differ in their last bit, as between two tensor sizes, would change places and with them the text.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1).tolist()
    sums_BV = probabilities(logits_BV, sampling).cumsum(dim=-1)
    drawn_B1 = torch.tensor(drawn, dtype=torch.float64, device=logits_BV.device).unsqueeze(1)
    # The last sum is 1 but for rounding. A number below 1 times it is below it, rounded too, and falls on some token.
    return torch.searchsorted(sums_BV, drawn_B1 * sums_BV[:, -1:], right=True).squeeze(1).tolist()


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities ``[B, V]``, fp64, after temperature, top-k and top-p, in this order."""
    scores = logits_BV.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        least_B1 = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least_B1, float("-inf"))
    chances_BV = scores.softmax(dim=-1)
    return chances_BV if sampling.top_p is None else _nucleus(chances_BV, sampling.top_p)


def _nucleus(chances_BV: Tensor, top_p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities reach `top_p` (arXiv:1904.09751), at least one."""
    ordered, tokens = chances_BV.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.zeros_like(chances_BV).scatter(-1, tokens, ordered.masked_fill(before >= top_p, 0.0))
    return kept / kept.sum(dim=-1, keepdim=True)
