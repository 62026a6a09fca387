"""Keys and values of the tokens that a model has read, so that one more costs the work of one.

Legend for shapes: B rows, S tokens read at a time, T tokens read in all, N local query heads, K local key-value heads,
D head dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.choice import Kernels

BLOCK = 256
"""Columns that memory grows by."""


class KeyValueCache:
    """What rows of different lengths have read, in every layer of a stage.

    The first read takes a prompt a row, filled up on the right: under the causal mask no token sees the filling, and
    what a row reads later is written over it. So a row's hidden states are those it has alone. Each read after that
    takes one token a row.
    """

    def __init__(self, lengths: Sequence[int], *, num_layers: int, device: torch.device) -> None:
        assert min(lengths) > 0
        self.first_read = True
        self.layers = [LayerCache(self) for _ in range(num_layers)]
        self._lengths, self._device = list(lengths), device
        self._describe()

    @property
    def columns(self) -> int:
        """Tokens of the longest row, those of the present read among them."""
        return max(self._lengths)

    @property
    def positions_BS(self) -> Tensor | None:
        """The positions of the tokens that are read now; None: 0..S-1 in every row."""
        return None if self.first_read else self.last_B.unsqueeze(1)

    def last_tokens(self, x_BSH: Tensor) -> Tensor:
        """Return ``[B, H]``, what the present read has made of each row's last token."""
        if not self.first_read:
            return x_BSH[:, -1]
        return x_BSH[torch.arange(len(self._lengths), device=self._device), self.last_B]

    def advance(self) -> None:
        """End the present read, and begin one of a token a row."""
        self.first_read = False
        self._lengths = [length + 1 for length in self._lengths]
        self._describe()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        self._lengths = [self._lengths[row] for row in rows]
        self._describe()
        for layer in self.layers:
            layer.keep(torch.tensor(rows, device=self._device))

    def _describe(self) -> None:
        """Lay the rows' lengths down where the layers need them, once for all."""
        self.last_B = torch.tensor(self._lengths, device=self._device) - 1
        self.seen_B11T = None
        if min(self._lengths) < self.columns:
            columns = torch.arange(self.columns, device=self._device)
            self.seen_B11T = (columns <= self.last_B.unsqueeze(1))[:, None, None]


class LayerCache:
    """The keys and values of one layer; memory for them grows by blocks, and is taken when the first come."""

    def __init__(self, rows: KeyValueCache) -> None:
        self._rows = rows
        self._keys_BKTD = self._values_BKTD = torch.empty(0)

    @property
    def first_read(self) -> bool:
        """Whether nothing was read before: attention is that within the tokens of this read."""
        return self._rows.first_read

    @property
    def positions_BS(self) -> Tensor | None:
        """The positions of the tokens that are read now; None: 0..S-1 in every row."""
        return self._rows.positions_BS

    def append(self, key_BSKD: Tensor, value_BSKD: Tensor) -> None:
        """Add the keys and values of the tokens that are read now."""
        self._keys_BKTD = self._with_room(self._keys_BKTD, key_BSKD)
        self._values_BKTD = self._with_room(self._values_BKTD, value_BSKD)
        if self.first_read:
            length = key_BSKD.shape[1]
            self._keys_BKTD[:, :, :length] = key_BSKD.transpose(1, 2)
            self._values_BKTD[:, :, :length] = value_BSKD.transpose(1, 2)
        else:
            rows, last = torch.arange(len(key_BSKD), device=key_BSKD.device), self._rows.last_B
            self._keys_BKTD[rows, :, last] = key_BSKD[:, 0]
            self._values_BKTD[rows, :, last] = value_BSKD[:, 0]

    def attend(self, query_BSND: Tensor, kernels: Kernels) -> Tensor:
        """Return ``[B, 1, N, D]``, what each row's one query finds among all that the row has read.

        The queries that share a key-value head stand as the rows of one product, so that no key is repeated.
        """
        columns = self._rows.columns
        keys, values = self._keys_BKTD[:, :, :columns], self._values_BKTD[:, :, :columns]
        query = query_BSND[:, 0].unflatten(1, (keys.shape[1], -1))
        query, keys, values = kernels.upcast(query, keys, values)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=self._rows.seen_B11T)
        return attended.flatten(1, 2).unsqueeze(1).to(query_BSND.dtype)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._keys_BKTD = self._keys_BKTD[rows]
        self._values_BKTD = self._values_BKTD[rows]

    def _with_room(self, held_BKTD: Tensor, new_BSKD: Tensor) -> Tensor:
        """Return what is held, with columns for all that this read reaches; zeros, since weight 0 of nan is nan."""
        batch, _, heads, width = new_BSKD.shape
        held = 0 if self.first_read else held_BKTD.shape[2]
        if self._rows.columns <= held:
            return held_BKTD
        room = new_BSKD.new_zeros(batch, heads, -(-self._rows.columns // BLOCK) * BLOCK, width)
        if held:
            room[:, :, :held] = held_BKTD
        return room
