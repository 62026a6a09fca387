"""Datasets of plugins: Python objects whose items are token ids, registered under the name that a run file gives."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from megalite.config import RunConfig
from megalite.data.order.streaming import Piece, epoch_order
from megalite.errors import UserError
from megalite.registry import DATASETS

_FINGERPRINTED = 8
"""Items that a fingerprint reads, the first and the last among them."""


@dataclass(frozen=True, slots=True)
class TokenSample:
    """An item of a dataset: token ids, at most ``data.sequence_length + 1``, and which of them count in the loss.

    ``loss_mask[i]`` says whether ``tokens[i]`` counts where it is the target, so the first value has no effect. Without
    it all count. A shorter sample is padded at its end, and padding does not count.
    """

    tokens: Sequence[int] | np.ndarray
    loss_mask: Sequence[bool] | np.ndarray | None = None


class TokenDataset(Protocol):
    """A dataset of a fixed length. Item `i` must be the same in every process, however often it is asked for.

    Items are read in a thread of their own. The order is that of `data.order: streaming`: a permutation of all items
    for each epoch, so that a run resumes at its place whatever the number of ranks.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TokenSample | Sequence[int] | np.ndarray: ...


Factory = TypeVar("Factory", bound=Callable[..., TokenDataset])


def register_dataset(name: str) -> Callable[[Factory], Factory]:
    """Register a dataset under the name that ``data.train[].dataset`` and ``data.valid[].dataset`` give.

    The decorated class or function is called as ``factory(config, **options)`` with the resolved `RunConfig` and the
    ``options`` of the run file, and returns a `TokenDataset`. Each process of a run calls it several times, so it
    should open files and not read them whole.
    """
    return DATASETS.register(name)


def open_registered(name: str, options: Mapping[str, Any], config: RunConfig) -> TokenDataset:
    """Make a registered dataset; raise UserError where that fails, or where the dataset has no item."""
    try:
        dataset = DATASETS[name](config, **options)
        length = len(dataset)
    except UserError:
        raise
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UserError(
            f"data: dataset {name!r} cannot be opened with options {{{given}}}: {type(error).__name__}: {error}; "
            "correct the options or the dataset"
        ) from error
    if not length:
        raise UserError(f"data: dataset {name!r} has no item; give at least one")
    return dataset


class RegisteredSamples:
    """Samples from the items of a dataset, each epoch in a permutation of its own, without end."""

    def __init__(self, dataset: TokenDataset, name: str, *, sequence_length: int, seed: int, items: range) -> None:
        """Take the items in the range `items`; raise UserError where it is empty."""
        if not items:
            raise UserError(f"data: dataset {name!r} has no item for this part of data.split; give it a larger share")
        self._dataset, self._name, self._items, self._seed = dataset, name, items, seed
        self.sequence_length, self.samples_per_epoch = sequence_length, len(items)
        self.num_samples: int | None = None
        self.has_loss_mask = True
        self._last: tuple[bytes, tuple[np.ndarray, np.ndarray]] | None = None

    def tokens(self, indices: np.ndarray) -> np.ndarray:
        """Return samples, int64[n] to int64[n, sequence_length + 1]; raise UserError for an item that is no sample."""
        return self._read(indices)[0]

    def loss_mask(self, indices: np.ndarray) -> np.ndarray:
        """Return which tokens are targets that count, int64[n] to uint8[n, sequence_length + 1]."""
        return self._read(indices)[1]

    def pieces(self, index: int) -> list[Piece]:
        """Return the item of a sample as one piece, padding included."""
        item = int(self._item_numbers(np.array([index]))[0])
        return [Piece(Path(self._name), item, 0, self.sequence_length + 1)]

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key = indices.tobytes()
        if self._last is None or self._last[0] != key:  # tokens and mask of a microbatch are asked for in turn
            rows = [
                padded_item(self._dataset, item, self._name, self.sequence_length + 1)
                for item in self._item_numbers(indices).tolist()
            ]
            self._last = key, (np.stack([tokens for tokens, _ in rows]), np.stack([mask for _, mask in rows]))
        return self._last[1]

    def _item_numbers(self, indices: np.ndarray) -> np.ndarray:
        return self._items.start + epoch_order(indices, self.samples_per_epoch, self._seed)


def padded_item(dataset: TokenDataset, item: int, name: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an item's tokens int64[length] and loss mask uint8[length]; raise UserError where it is no sample."""
    found = dataset[item]
    sample = found if isinstance(found, TokenSample) else TokenSample(found)
    tokens = np.asarray(sample.tokens)
    where = f"data: dataset {name!r}, item {item}:"
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or not 2 <= len(tokens) <= length:
        raise UserError(
            f"{where} has shape {list(tokens.shape)} and type {tokens.dtype}; return 2 to {length} token ids, which is "
            "data.sequence_length + 1, as integers in one dimension"
        )
    mask = np.ones(len(tokens), np.uint8) if sample.loss_mask is None else np.asarray(sample.loss_mask)
    if mask.shape != tokens.shape:
        raise UserError(
            f"{where} has {len(tokens)} tokens and a loss mask of shape {list(mask.shape)}; make them equal"
        )
    padding = length - len(tokens)
    return np.pad(tokens.astype(np.int64), (0, padding)), np.pad((mask != 0).astype(np.uint8), (0, padding))


def fingerprint_of_items(dataset: TokenDataset, name: str, sequence_length: int) -> str:
    """Return a SHA-256 over the length of a dataset and a few of its items."""
    digest, last = hashlib.sha256(f"{name} {len(dataset)}".encode()), len(dataset) - 1
    for item in sorted({last * number // (_FINGERPRINTED - 1) for number in range(_FINGERPRINTED)}):
        for array in padded_item(dataset, item, name, sequence_length + 1):
            digest.update(array.tobytes())
    return digest.hexdigest()
