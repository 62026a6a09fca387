"""Which documents a step of a run trains on, from the run's configuration alone."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megalite.data.batch_reader import BatchReader
from megalite.data.batch_schedule import BatchSchedule, PassedOver
from megalite.data.collate import SampleRules
from megalite.data.datasets import open_datasets
from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.statistics import readable
from megalite.data.order.streaming import Piece
from megalite.data.tokenizers.base import Tokenizer
from megalite.data.tokenizers.load import load_tokenizer
from megalite.errors import UserError
from megalite.training.plan import Plan, prepare


def passed_over(metrics: Path) -> list[PassedOver]:
    """Return the samples that a run has passed over so far, as its metrics tell; none where there are no metrics."""
    gaps: list[PassedOver] = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        if "passed_over_samples" not in line:
            continue
        with suppress(ValueError, KeyError, TypeError):
            told = json.loads(line)
            gap = PassedOver(int(told["step"]) - 1, int(told["passed_over_samples"]))
            # What was passed over from an earlier step on includes what was from a later one.
            gaps = [*(before for before in gaps if before.after < gap.after), gap]
    return gaps


def consumed_by_step(metrics: Path, sequence_length: int) -> dict[int, int]:
    """Return how many samples a run had consumed after each step that it did, as its metrics tell; none where they do
    not. Its batches need not always have been of the size that the run file has now."""
    found: dict[int, int] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            told = json.loads(line)
            samples, rest = divmod(int(told["tokens"]), sequence_length)
            if rest:
                return {}
            found[int(told["step"])] = samples
    return found


@dataclass(frozen=True, slots=True)
class SeenSample:
    """One sample of a step: its number in the run's order, who trains on it, and what it is made of."""

    sample: int
    data_rank: int
    microbatch: int
    pieces: tuple[Piece, ...]


class Provenance:
    """Answers for one run: a run's folder, or a run file that has not been run yet.

    Raises UserError where the path is neither, or where the data is gone.
    """

    def __init__(self, path: Path) -> None:
        self.plan: Plan = prepare(path / "config.yaml" if path.is_dir() else path, [], None)
        self.config = self.plan.config
        metrics = self.config.run.dir / "metrics.jsonl"
        self._passed_over = passed_over(metrics)
        self._consumed = {0: 0, **consumed_by_step(metrics, self.config.data.sequence_length)}
        self._samples = open_datasets(self.config, keep_index=self.config.run.dir.is_dir()).train
        self._tokenizer: Tokenizer | None = None
        if self.config.data.tokenizer is not None:
            self._tokenizer = load_tokenizer(self.config.data.tokenizer)
        self._dataset = cache(IndexedDataset)

    def step(self, step: int, rank: int | None = None) -> Iterator[SeenSample]:
        """Return the samples of a step, by data rank and microbatch; with `rank`, those of this rank alone.

        Raises UserError where the run has no such step or rank.
        """
        if not 1 <= step <= self.config.train.steps:
            raise UserError(f"--step={step}: the run has steps 1 to {self.config.train.steps}; use one of them")
        layout = self.plan.layout
        if rank is not None and not 0 <= rank < layout.world_size:
            raise UserError(f"--rank={rank}: the run has ranks 0 to {layout.world_size - 1}; use one of them")
        readers = layout.names_of("batch")
        return self._samples_of(step, range(layout.size(*readers)) if rank is None else [layout.index(rank, *readers)])

    def _samples_of(self, step: int, data_ranks: Iterable[int]) -> Iterator[SeenSample]:
        for data_rank in data_ranks:
            reader = BatchReader(
                self._samples,
                SampleRules(),
                micro_batch_size=self.config.train.micro_batch_size,
                data_rank=data_rank,
                data_size=self.plan.layout.group_size("batch"),
            )
            for microbatch, samples in enumerate(reader.slices(self.samples(step))):
                for sample in samples:
                    yield SeenSample(sample, data_rank, microbatch, tuple(self._samples.pieces(sample)))

    def samples(self, step: int) -> range:
        """Return the numbers of the samples of a step: as many as it consumed, else as many as its batch will have."""
        after = max(done for done in self._consumed if done < step)
        schedule = BatchSchedule(self.config.train, self._passed_over, after=after, consumed=self._consumed[after])
        samples = schedule.samples(step)
        if after == step - 1 and step in self._consumed:
            return range(samples.start, samples.start + self._consumed[step] - self._consumed[after])
        return samples

    def text(self, piece: Piece) -> str | None:
        """Return what a piece reads as (`readable`), None without a tokenizer."""
        if self._tokenizer is None:
            return None
        dataset = self._dataset(piece.prefix)
        first = dataset.document_span(piece.document)[0] + piece.offset
        mask = dataset.loss_mask(first, piece.length) if dataset.has_loss_mask else None
        return readable(self._tokenizer, dataset.tokens(first, piece.length), mask)
