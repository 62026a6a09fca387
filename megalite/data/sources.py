"""Sources of samples: a token index on disk, or a dataset that a plugin registers, behind one interface."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megalite.config import DataSection, DataSource, RunConfig, ValidationSet
from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.fingerprint import fingerprint
from megalite.data.order.megatron import MegatronSamples, epochs_of
from megalite.data.order.streaming import Samples, StreamingSamples
from megalite.data.registered import RegisteredSamples, fingerprint_of_items, open_registered


class Source(Protocol):
    """A source of samples. Its units are what `data.split` and the order divide: documents, or items of a dataset."""

    location: Path
    """The prefix of a token index, or the name of a registered dataset: what messages and records call the source."""
    num_units: int
    has_loss_mask: bool
    unigram_entropy: float | None
    """The entropy of the tokens' frequencies, in nats; None where it is not known."""

    def num_tokens(self, units: range) -> int:
        """Return the number of tokens of some units."""
        ...

    def epochs(self, units: range, num_samples: int) -> tuple[int, bool]:
        """Return what `epochs_of` finds for `num_samples` samples of some units in the order `megatron`."""
        ...

    def fingerprint(self) -> str:
        """Return a SHA-256 that tells the content from another, read from a small part of it."""
        ...

    def samples(self, units: range, num_samples: int | None, cache_dir: Path | None) -> Samples:
        """Return the samples of some units; the order `megatron` has one epoch without `num_samples`.

        It keeps its index in `cache_dir`, if there is one.
        """
        ...


def open_source(source: DataSource | ValidationSet, config: RunConfig) -> Source:
    """Open a source of a run file; raise UserError where it is missing or damaged."""
    if source.dataset is not None:
        return _RegisteredSource(source.dataset, source.options, config)
    assert source.prefix is not None
    return _IndexedSource(source.prefix, config.data, config.run.seed)


class _IndexedSource:
    """A token index, whose units are documents, or Megatron's notion of them in its order."""

    def __init__(self, prefix: Path, data: DataSection, seed: int) -> None:
        self._indexed, self._data, self._seed = IndexedDataset(prefix), data, seed
        self.location, self.has_loss_mask = self._indexed.prefix, self._indexed.has_loss_mask
        self.num_units = self._indexed.num_sequences if data.order == "megatron" else self._indexed.num_documents
        sidecar = self._indexed.sidecar
        self.unigram_entropy = sidecar.token_counts_entropy if sidecar else None

    def num_tokens(self, units: range) -> int:
        if not units:
            return 0
        return self._indexed.document_span(units[-1])[1] - self._indexed.document_span(units[0])[0]

    def epochs(self, units: range, num_samples: int) -> tuple[int, bool]:
        tokens = int(self._indexed.sequence_lengths(units).sum(dtype="int64"))
        return epochs_of(max(1, tokens), sequence_length=self._data.sequence_length, num_samples=num_samples)

    def fingerprint(self) -> str:
        return fingerprint(self.location)

    def samples(self, units: range, num_samples: int | None, cache_dir: Path | None) -> Samples:
        length, seed = self._data.sequence_length, self._seed
        if self._data.order == "streaming":
            return StreamingSamples(self._indexed, sequence_length=length, seed=seed, documents=units)
        return MegatronSamples(
            self._indexed,
            sequence_length=length,
            seed=seed,
            documents=units,
            num_samples=num_samples,
            cache_dir=cache_dir,
        )


class _RegisteredSource:
    """A dataset that a plugin registers; each item is a sample."""

    has_loss_mask = True
    """Padding does not count in the loss."""
    unigram_entropy: float | None = None

    def __init__(self, name: str, options: Mapping[str, Any], config: RunConfig) -> None:
        self.location, self._config = Path(name), config
        self._dataset = open_registered(name, options, config)
        self.num_units = len(self._dataset)

    def num_tokens(self, units: range) -> int:
        return len(units) * self._config.data.sequence_length

    def epochs(self, units: range, num_samples: int) -> tuple[int, bool]:
        raise NotImplementedError("the order 'megatron' has no registered datasets")

    def fingerprint(self) -> str:
        return fingerprint_of_items(self._dataset, str(self.location), self._config.data.sequence_length)

    def samples(self, units: range, num_samples: int | None, cache_dir: Path | None) -> Samples:
        length, seed = self._config.data.sequence_length, self._config.run.seed
        return RegisteredSamples(self._dataset, str(self.location), sequence_length=length, seed=seed, items=units)
