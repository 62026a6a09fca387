"""KV cache: the keys and values of all tokens so far, so that generating a token costs the work of one token.

Legend for shapes: B rows, S tokens of the current pass, T tokens so far, N local query heads, K local key-value heads,
D head dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.choice import Kernels

BLOCK = 256
"""Memory grows in multiples of this number of tokens."""


class KVCache:
    """The KV cache of rows of different lengths, for every layer of a stage.

    The first pass (prefill) takes one prompt per row, padded on the right. Under the causal mask no token attends to
    the padding, and later tokens overwrite it, so a row's hidden states do not depend on the other rows. Each later
    pass (decode) takes one token per row.
    """

    def __init__(self, lengths: Sequence[int], *, num_layers: int, device: torch.device) -> None:
        assert min(lengths) > 0
        self.is_prefill = True
        self.layers = [LayerKVCache(self) for _ in range(num_layers)]
        self._lengths, self._device = list(lengths), device
        self._update_positions()

    @property
    def columns(self) -> int:
        """Number of tokens of the longest row, with those of the current pass."""
        return max(self._lengths)

    @property
    def positions_BS(self) -> Tensor | None:
        """The positions of the tokens of the current pass; None: 0..S-1 in every row."""
        return None if self.is_prefill else self.last_B.unsqueeze(1)

    def last_tokens(self, x_BSH: Tensor) -> Tensor:
        """Return ``[B, H]``, the hidden states of each row's last token in the current pass."""
        if not self.is_prefill:
            return x_BSH[:, -1]
        return x_BSH[torch.arange(len(self._lengths), device=self._device), self.last_B]

    def advance(self) -> None:
        """End the current pass; the next pass takes one token per row."""
        self.is_prefill = False
        self._lengths = [length + 1 for length in self._lengths]
        self._update_positions()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self._lengths = [self._lengths[row] for row in rows]
        self._update_positions()
        for layer in self.layers:
            layer.select_rows(torch.tensor(rows, device=self._device))

    def _update_positions(self) -> None:
        """Recompute the last positions and the attention mask from the lengths of the rows, once for all layers."""
        self.last_B = torch.tensor(self._lengths, device=self._device) - 1
        self.attention_mask_B11T = None
        if min(self._lengths) < self.columns:
            columns = torch.arange(self.columns, device=self._device)
            self.attention_mask_B11T = (columns <= self.last_B.unsqueeze(1))[:, None, None]


class LayerKVCache:
    """The keys and values of one layer; memory is allocated at the first `append` and grows in blocks."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._keys_BKTD = self._values_BKTD = torch.empty(0)

    @property
    def is_prefill(self) -> bool:
        """Whether this is the first pass, in which tokens attend only to tokens of the same pass."""
        return self._cache.is_prefill

    @property
    def positions_BS(self) -> Tensor | None:
        """The positions of the tokens of the current pass; None: 0..S-1 in every row."""
        return self._cache.positions_BS

    def append(self, key_BSKD: Tensor, value_BSKD: Tensor) -> None:
        """Append the keys and values of the tokens of the current pass."""
        self._keys_BKTD = self._grown(self._keys_BKTD, key_BSKD)
        self._values_BKTD = self._grown(self._values_BKTD, value_BSKD)
        if self.is_prefill:
            length = key_BSKD.shape[1]
            self._keys_BKTD[:, :, :length] = key_BSKD.transpose(1, 2)
            self._values_BKTD[:, :, :length] = value_BSKD.transpose(1, 2)
        else:
            rows, last = torch.arange(len(key_BSKD), device=key_BSKD.device), self._cache.last_B
            self._keys_BKTD[rows, :, last] = key_BSKD[:, 0]
            self._values_BKTD[rows, :, last] = value_BSKD[:, 0]

    def attend(self, query_BSND: Tensor, kernels: Kernels) -> Tensor:
        """Return ``[B, 1, N, D]``, the attention of each row's query over all tokens of the row.

        The queries that share a key-value head are the rows of one matrix product, so that no key is repeated.
        """
        columns = self._cache.columns
        keys, values = self._keys_BKTD[:, :, :columns], self._values_BKTD[:, :, :columns]
        query = query_BSND[:, 0].unflatten(1, (keys.shape[1], -1))
        query, keys, values = kernels.upcast(query, keys, values)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=self._cache.attention_mask_B11T)
        return attended.flatten(1, 2).unsqueeze(1).to(query_BSND.dtype)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self._keys_BKTD = self._keys_BKTD[rows]
        self._values_BKTD = self._values_BKTD[rows]

    def _grown(self, cached_BKTD: Tensor, new_BSKD: Tensor) -> Tensor:
        """Return the cache, enlarged if needed for the current pass. New memory is zero: 0 times nan would be nan."""
        batch, _, heads, width = new_BSKD.shape
        held = 0 if self.is_prefill else cached_BKTD.shape[2]
        if self._cache.columns <= held:
            return cached_BKTD
        room = new_BSKD.new_zeros(batch, heads, -(-self._cache.columns // BLOCK) * BLOCK, width)
        if held:
            room[:, :, :held] = cached_BKTD
        return room
