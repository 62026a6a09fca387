"""The data of a run: its sources, split and blended as the run file says, and how often each is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megalite.config import RunConfig
from megalite.config.data import SPLIT_VALIDATION
from megalite.data.batch_schedule import BatchSchedule
from megalite.data.fill_in_the_middle import FillInTheMiddle, fim_tokens
from megalite.data.order.blend import BlendedSamples, megatron_source_sizes
from megalite.data.order.streaming import Samples, split_documents
from megalite.data.sources import Source, open_source
from megalite.data.tokenizers.load import load_tokenizer
from megalite.errors import UserError


@dataclass(frozen=True, slots=True)
class SourceUse:
    """What a run reads of one source."""

    prefix: Path
    samples: int
    epochs: float
    epoch_tokens: int


@dataclass(frozen=True, slots=True)
class Datasets:
    """The samples to train on, and by name those to evaluate on.

    `unigram_entropy`, in nats a token, is the best that a model without context can do; None where it is not known.
    """

    train: Samples
    valid: Mapping[str, Samples] = field(default_factory=dict)
    uses: tuple[SourceUse, ...] = ()
    fim: FillInTheMiddle | None = None
    unigram_entropy: float | None = None
    max_epochs: float = float("inf")
    eval_samples: int = 0
    """How many samples of each validation set an evaluation reads at most."""

    def num_evaluated(self, name: str) -> int:
        """Return how many samples of a validation set an evaluation reads: its first, each once."""
        return min(self.eval_samples, self.valid[name].samples_per_epoch)

    def counts(self, num_samples: int) -> tuple[int, ...]:
        """Return how many of the first samples to train on are of each source."""
        return tuple(self.train.counts(num_samples)) if isinstance(self.train, BlendedSamples) else (num_samples,)

    def describe(self) -> list[str]:
        """Return a line for each source, and one for each that is read more often than it should be."""
        total = sum(use.samples for use in self.uses)
        lines = [
            f"data: {use.prefix} | {use.samples:,} samples, {use.samples / total:.2%} | {use.epochs:.2f} epochs of "
            f"{use.epoch_tokens:,} tokens"
            for use in self.uses
        ]
        for name, samples in self.valid.items():
            read, there = self.num_evaluated(name), samples.samples_per_epoch
            some = f", of which an evaluation reads {read:,}" if read < there else ""
            lines.append(f"validation: {name} | {there:,} samples{some}")
        lines += [
            f"warning: {use.prefix} is read {use.epochs:.2f} times, more than data.max_epochs={self.max_epochs:g}; "
            "give it a smaller weight, add text, train fewer steps, or raise data.max_epochs"
            for use in self.uses
            if use.epochs > self.max_epochs
        ]
        return lines


def open_datasets(config: RunConfig, *, keep_index: bool = True) -> Datasets:
    """Map the data of a run into memory and lay samples over it; raise UserError where there is less than a batch.

    With `keep_index` false the order `megatron` writes no index to the disk.
    """
    data, train = config.data, config.train
    size = BatchSchedule(train).consumed(train.steps)
    layer = _Layer(config, keep_index)
    sources = [open_source(source, config) for source in data.train]
    splits = [split_documents(source.num_units, data.split or (1.0,)) for source in sources]
    training, valid = [split[0] for split in splits], {}
    mixture, uses = layer.mixture(sources, training, size)
    _at_least_a_batch(config, sum(use.epoch_tokens // data.sequence_length for use in uses))
    wanted = train.eval_batches * train.global_batch_size
    if train.eval_every:
        if data.split is not None:
            held_out = [split[1] for split in splits]
            valid[SPLIT_VALIDATION] = layer.held_out(sources, held_out, wanted)
        for named in data.valid:
            source = open_source(named, config)
            valid[named.name] = layer.samples(source, range(source.num_units), None)
    if data.fim_rate:
        _require_no_loss_mask(sources)
    return Datasets(
        train=mixture,
        valid=valid,
        uses=uses,
        fim=_fill_in_the_middle(config),
        unigram_entropy=sources[0].unigram_entropy if len(sources) == 1 else None,
        max_epochs=data.max_epochs,
        eval_samples=wanted,
    )


class _Layer:
    """Lays samples over sources in the order that the run file asks for."""

    def __init__(self, config: RunConfig, keep_index: bool) -> None:
        self._data = config.data
        self._cache = (config.data.index_cache or config.run.dir / "index") if keep_index else None

    def samples(self, source: Source, units: range, num_samples: int | None) -> Samples:
        """Return the samples of some units; without `num_samples` the order `megatron` has those of one epoch."""
        return source.samples(units, num_samples, self._cache)

    def held_out(self, sources: Sequence[Source], units: Sequence[range], num_samples: int) -> Samples:
        """Return samples to evaluate on: an epoch of one source, `num_samples` of a blend of several."""
        if len(sources) == 1:
            return self.samples(sources[0], units[0], None)
        return self.mixture(sources, units, num_samples)[0]

    def mixture(
        self, sources: Sequence[Source], units: Sequence[range], num_samples: int
    ) -> tuple[Samples, tuple[SourceUse, ...]]:
        """Return the blend of the sources by their weights, and what of each its first `num_samples` read."""
        if len(sources) == 1:
            samples = self.samples(sources[0], units[0], num_samples)
            return samples, (self._use(sources[0], samples, num_samples),)
        weights = [
            float(opened.num_tokens(chosen)) if source.weight == "auto" else source.weight
            for source, opened, chosen in zip(self._data.train, sources, units, strict=True)
        ]
        sizes = [num_samples] * len(sources)
        if self._data.order == "megatron":
            sizes = megatron_source_sizes(num_samples, weights)
        parts = [self.samples(*part) for part in zip(sources, units, sizes, strict=True)]
        end = num_samples if self._data.order == "megatron" else None
        blend = BlendedSamples(parts, weights, order=self._data.order, num_samples=end, cache_dir=self._cache)
        counts = blend.counts(num_samples)
        return blend, tuple(map(self._use, sources, parts, counts))

    def _use(self, source: Source, samples: Samples, count: int) -> SourceUse:
        epoch_tokens = samples.samples_per_epoch * samples.sequence_length
        return SourceUse(source.location, count, count / samples.samples_per_epoch, epoch_tokens)


def _require_no_loss_mask(sources: Sequence[Source]) -> None:
    for source in sources:
        if source.has_loss_mask:
            raise UserError(
                f"{source.location}: its loss mask says which tokens count, and data.fim_rate moves them; set "
                "data.fim_rate=0, or leave this source out"
            )


def _fill_in_the_middle(config: RunConfig) -> FillInTheMiddle | None:
    data = config.data
    if not data.fim_rate or data.tokenizer is None:
        return None
    tokenizer = load_tokenizer(data.tokenizer)
    prefix, middle, suffix = fim_tokens(tokenizer, data.fim_tokens)
    return FillInTheMiddle(data.fim_rate, data.fim_spm_rate, prefix, middle, suffix, tokenizer)


def _at_least_a_batch(config: RunConfig, samples: int) -> None:
    wanted = config.train.global_batch_size
    if samples < wanted:
        names = ", ".join(str(source.location) for source in config.data.train)
        share = ", a larger share in data.split" if config.data.split else ""
        raise UserError(
            f"{names}: {samples} samples of data.sequence_length={config.data.sequence_length} to train on are "
            f"less than train.global_batch_size={wanted}; give more text{share}, a shorter sequence or a smaller batch"
        )
