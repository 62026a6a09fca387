"""Where a box of a global tensor lies in the shards of Megatron's tensor ranks: which dim they divide, which rows.

A rank's query-key-value tensor holds its own heads only, packed in one of three ways by the checkpoint's version, with
H heads of width D in G groups on a rank:

- 0: ``[3, H, D]``, all queries, then all keys, then all values;
- 1: ``[H, D, 3]``;
- 2 and on: ``[G, H / G + 2, D]``, each group's queries, then its key and its value; without groups ``[H, 3, D]``.

A gated MLP's tensor holds the rank's share of the gate and then that of the other projection.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megalite.config import ModelConfig
from megalite.parallel.regions import Region

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Where rows of one tensor stand among those it is packed with: runs of `run`, one each `stride`, from `offset` on.

    >>> Rows(run=2, stride=6, offset=4).of(1, 5)
    array([ 5, 10, 11, 16])
    """

    run: int
    stride: int
    offset: int

    def of(self, start: int, stop: int) -> np.ndarray:
        """Return the packed places of rows `start` to `stop`."""
        row = np.arange(start, stop)
        return row // self.run * self.stride + row % self.run + self.offset


@dataclass(frozen=True, slots=True)
class Divided:
    """A global tensor in the shards of the tensor ranks.

    Of dim `dim` each rank holds `share` after the rank before it, None where every rank holds all. `rows` says where
    these stand in its shard, None where they stand alone.
    """

    shards: Sequence["Tensor"]
    shape: tuple[int, ...]
    dim: int | None = None
    share: int = 0
    rows: Rows | None = None
    added: float = 0.0
    """What the file leaves out of every element: 1 in norms that are stored as what they add to 1."""

    def read(self, region: Region, out: np.ndarray) -> None:
        """Fill `out`, fp32 of the box's shape, with a box of the global tensor."""
        if self.dim is None:
            out[...] = self.shards[0][region.slices].float().numpy()
        else:
            self._read_divided(self.dim, region, out)
        if self.added:
            out += np.float32(self.added)

    def _read_divided(self, dim: int, region: Region, out: np.ndarray) -> None:
        import torch

        wanted = region.slices
        for rank, shard in enumerate(self.shards):
            start, stop = max(wanted[dim].start, rank * self.share), min(wanted[dim].stop, (rank + 1) * self.share)
            if start >= stop:
                continue
            whole = tuple(slice(None) if at == dim else part for at, part in enumerate(wanted))
            first, last = start - rank * self.share, stop - rank * self.share
            if self.rows is None:
                part = shard[whole].narrow(dim, first, last - first)
            else:
                part = shard[whole].index_select(dim, torch.from_numpy(self.rows.of(first, last)))
            begin = start - wanted[dim].start
            target = tuple(slice(begin, begin + stop - start) if at == dim else slice(None) for at in range(out.ndim))
            out[target] = part.float().numpy()


@dataclass(frozen=True, slots=True)
class Division:
    """How a checkpoint of one model divides and packs its tensors."""

    model: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    """Those of the model's global tensors."""
    version: float
    zero_centred_norms: bool
    """The weights of norms are stored as what they add to 1 (``--apply-layernorm-1p``)."""

    def source(self, name: str) -> str:
        """Return the name, in a `Collection`, of the tensor that holds the global tensor `name`."""
        fused = re.sub(r"attention\.(query|key|value)\.", "attention.query_key_value.", name)
        return re.sub(r"mlp\.gate\.", "mlp.up.", fused)

    def divided(self, name: str, shards: Sequence["Tensor"]) -> Divided | None:
        """Return where the global tensor `name` lies in `shards`; None where these have other sizes."""
        shape = self.shapes[name]
        ranks, local = len(shards), tuple(shards[0].shape)
        if any(tuple(shard.shape) != local for shard in shards):
            return None
        module, _, leaf = name.rpartition(".")
        if module.endswith(("embedding.tokens", "head")):
            # Padded to a multiple, so that the last rows are nobody's.
            fits = len(local) == 2 and local[1] == shape[1] and local[0] * ranks >= shape[0]
            return Divided(shards, shape, 0, local[0]) if fits else None
        if module.endswith(("attention.output", "mlp.down")) and leaf == "weight":
            fits = local == (shape[0], shape[1] // ranks) and shape[1] % ranks == 0
            return Divided(shards, shape, 1, local[1]) if fits else None
        if module.endswith((".query", ".key", ".value", ".gate", ".up")):
            share, rows = shape[0] // ranks, self._rows(module, ranks)
            packed = self._packed_rows(name) // ranks
            fits = shape[0] % ranks == 0 and local == (packed, *shape[1:])
            return Divided(shards, shape, 0, share, rows) if fits else None
        added = 1.0 if self.zero_centred_norms and module.endswith("norm") and leaf == "weight" else 0.0
        return Divided(shards, shape, added=added) if local == shape else None

    def _packed_rows(self, name: str) -> int:
        """Return the rows of all global tensors that are packed together with `name`."""
        module, leaf = name.rpartition(".")[0].rpartition(".")[0], name.rpartition(".")[2]
        parts = ("gate", "up") if module.endswith("mlp") else ("query", "key", "value")
        return sum(self.shapes.get(f"{module}.{part}.{leaf}", (0,))[0] for part in parts)

    def _rows(self, module: str, ranks: int) -> Rows | None:
        model, (around, _, part) = self.model, module.rpartition(".")
        if part in ("gate", "up"):
            inner = model.intermediate_size // ranks
            is_gated = f"{around}.gate.weight" in self.shapes
            return Rows(inner, inner, inner if part == "up" else 0) if is_gated else None
        width, heads = model.head_dim, model.num_attention_heads // ranks
        index = ("query", "key", "value").index(part)
        if self.version < 1:
            return Rows(heads * width, heads * width, index * heads * width)
        if self.version < 2:
            return Rows(1, 3, index)
        queries = model.num_attention_heads // model.num_key_value_heads
        return Rows(
            queries * width if part == "query" else width,
            (queries + 2) * width,
            (0, queries, queries + 1)[index] * width,
        )
