"""The section `data`: what is trained on, in which order, and what of it counts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from megalite.config.registered import DATASET
from megalite.config.source_forms import require_list_of_sources
from megalite.settings.section import (
    SHARE,
    Count,
    FilePath,
    Flag,
    Index,
    Name,
    PositiveNumber,
    Section,
    Share,
    fields_of,
)
from megalite.settings.validation import Fault, show
from megalite.settings.values import POSITIVE, TEXTS, Kind, choice

ORDER = choice("streaming", "megatron")
SPLIT_VALIDATION = "valid"
"""The name of the validation set that `data.split` makes."""


def _shares(value: Any) -> list[float]:
    if not isinstance(value, list | tuple) or len(value) not in (2, 3):
        raise ValueError
    shares = [SHARE.read(item) if not isinstance(item, int) else float(item) for item in value]
    whole = all(isinstance(item, int) for item in value)
    if min(shares) < 0 or shares[0] == 0 or (abs(sum(shares) - 1) > 1e-9 and not whole):
        raise ValueError
    return shares


def _weight(value: Any) -> float | str:
    return value if value == "auto" else POSITIVE.read(value)


def _options(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) and key.isidentifier() for key in value):
        raise ValueError
    return value


def _three_names(value: Any) -> list[str]:
    names = TEXTS.read(value)
    if len(names) != 3:
        raise ValueError
    return names


OPTIONS = Kind("a section of keyword arguments, such as {path: data/x}", _options)
SHARES = Kind("two or three shares that sum to 1, such as [0.98, 0.01, 0.01], or whole numbers", _shares)
WEIGHT = Kind("a number above 0, or 'auto' for the size in tokens", _weight)
THREE_NAMES = Kind("three tokens: prefix, middle, suffix", _three_names)


class _Source(Section, frozen=True):
    """A tokenised corpus, PREFIX.bin and PREFIX.idx, or a dataset that a plugin registers."""

    prefix: FilePath | None = None
    dataset: Annotated[str | None, DATASET] = None
    """A dataset that a plugin registers, in place of `prefix`."""
    options: Annotated[dict[str, Any], OPTIONS] = {}
    """Keyword arguments of the dataset."""

    @property
    def location(self) -> Path:
        """The prefix, or the name of the dataset, for messages and records."""
        return self.prefix or Path(self.dataset or "")

    def faults(self) -> Iterator[Fault]:
        if self.prefix is None and self.dataset is None:
            yield Fault(("prefix",), " is missing; write a path, or dataset: the name of a registered dataset")
        if self.prefix is not None and self.dataset is not None:
            yield Fault(("dataset",), f"={show(self.dataset)} stands beside prefix; keep one of them")
        if self.options and self.dataset is None:
            yield Fault(("options",), f"={show(self.options)} belongs to a dataset, not to a prefix; leave it out")


class DataSource(_Source, frozen=True):
    """A source to train on, and its share of the samples."""

    weight: Annotated[float | Literal["auto"], WEIGHT] = 1.0


class ValidationSet(_Source, frozen=True):
    """A source to evaluate on, under a name of its own."""

    name: Name = Field(default_factory=lambda given: (given["prefix"] or Path(given["dataset"] or "valid")).name)


class DataSection(Section, frozen=True):
    """What is trained on, in sequences of `sequence_length` tokens."""

    tokenizer: FilePath | None = None
    sequence_length: Count
    train: tuple[DataSource, ...]
    """In the run file also the path of a file of weights and prefixes."""
    valid: tuple[ValidationSet, ...] = ()
    split: Annotated[tuple[float, ...], SHARES] | None = None
    """Shares of the training sources' documents that train, validate and are kept back; instead of `valid`."""
    order: Annotated[Literal["streaming", "megatron"], ORDER] = "streaming"
    max_epochs: PositiveNumber = 4.0
    """Passes over one source above which a run warns: up to four are nearly as good as new text (arXiv:2305.16264)."""
    index_cache: FilePath | None = None
    """Where the order `megatron` keeps its index; ``index`` in the run's folder unless given."""
    reset_attention_mask: Flag = False
    reset_position_ids: Flag = False
    eod_mask_loss: Flag = False
    fim_rate: Share = 0.0
    """Share of the documents whose middle is moved to the end (arXiv:2207.14255)."""
    fim_spm_rate: Share = 0.5
    """Of those, the share in the order suffix, prefix, middle."""
    fim_tokens: Annotated[tuple[str, str, str], THREE_NAMES] | None = None
    prefetch: Index = 2
    """Steps whose batches are read ahead; 0 reads each when it is due."""

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _require_list(cls, value: Any, info: ValidationInfo) -> Any:
        source = DataSource if info.field_name == "train" else ValidationSet
        require_list_of_sources(f"data.{info.field_name}", value, ", ".join(fields_of(source)))
        return value

    def faults(self) -> Iterator[Fault]:
        if not self.train:
            yield Fault(("train",), " has no source; write one: [{prefix: PATH}]")
        if self.valid and self.split:
            yield Fault(("split",), f"={show(self.split)} stands beside data.valid; keep one of them")
        names = [valid.name for valid in self.valid]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield Fault(("valid", index, "name"), f"={show(name)} stands twice; give each set a name of its own")
        automatic = [source.weight == "auto" for source in self.train]
        if any(automatic) and not all(automatic):
            index = automatic.index(False)
            text = f"={show(self.train[index].weight)} stands beside weights that are auto; write auto for all or none"
            yield Fault(("train", index, "weight"), text)
        registered = next((source.dataset for source in (*self.train, *self.valid) if source.dataset), None)
        if registered is not None and self.order == "megatron":
            text = f"='megatron' is an order of tokenised corpora, and {registered!r} is a registered dataset"
            yield Fault(("order",), f"{text}; write streaming")
        if self.fim_rate and self.tokenizer is None:
            yield Fault(("fim_rate",), f"={show(self.fim_rate)} cuts text, and there is no data.tokenizer; give it")

    @property
    def has_validation(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.valid) or (self.split is not None and self.split[1] > 0)

    @property
    def packs(self) -> bool:
        """Whether samples are laid out by their documents, rather than as one stretch of text."""
        return self.reset_attention_mask or self.reset_position_ids or self.eod_mask_loss
