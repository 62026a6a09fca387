"""Data provenance: the documents that a step of a run trains on, from the run's configuration and metrics."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megalite.data.batch_reader import BatchReader
from megalite.data.batch_schedule import BatchSchedule, SkippedSamples
from megalite.data.collate import SampleRules
from megalite.data.datasets import open_datasets
from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.statistics import readable
from megalite.data.order.streaming import Piece
from megalite.data.tokenizers.base import Tokenizer
from megalite.data.tokenizers.load import load_tokenizer
from megalite.errors import UserError
from megalite.planning.plan import Plan, prepare


def passed_over(metrics: Path) -> list[SkippedSamples]:
    """Return the samples that a run has skipped so far, from its metrics file; empty without a metrics file."""
    gaps: list[SkippedSamples] = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        if "passed_over_samples" not in line:
            continue
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            gap = SkippedSamples(int(record["step"]) - 1, int(record["passed_over_samples"]))
            # A rollback to an earlier step includes the samples skipped by later ones.
            gaps = [*(before for before in gaps if before.after < gap.after), gap]
    return gaps


def consumed_by_step(metrics: Path, sequence_length: int) -> dict[int, int]:
    """Return how many samples a run had consumed after each of its steps, from its metrics file; empty where unknown.

    The batches of earlier steps may have had another size than the run file has now.
    """
    consumed: dict[int, int] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            samples, rest = divmod(int(record["tokens"]), sequence_length)
            if rest:
                return {}
            consumed[int(record["step"])] = samples
    return consumed


@dataclass(frozen=True, slots=True)
class SeenSample:
    """One sample of a step: its number in the run's order, its data rank and microbatch, its pieces of documents."""

    sample: int
    data_rank: int
    microbatch: int
    pieces: tuple[Piece, ...]


class Provenance:
    """Data provenance of one run, given by the run's folder or by a run file that has not been started.

    Raises UserError where the path is neither, or where the data is missing.
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
        self._registered = {source.location for source in self.config.data.train if source.dataset is not None}
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
        """Return the numbers of the samples of a step, of a finished step from the metrics, else from the schedule."""
        after = max(done for done in self._consumed if done < step)
        schedule = BatchSchedule(self.config.train, self._passed_over, after=after, consumed=self._consumed[after])
        samples = schedule.samples(step)
        if after == step - 1 and step in self._consumed:
            return range(samples.start, samples.start + self._consumed[step] - self._consumed[after])
        return samples

    def text(self, piece: Piece) -> str | None:
        """Return the readable text of a piece (`readable`); None without a tokenizer, and of a registered dataset."""
        if self._tokenizer is None or piece.prefix in self._registered:
            return None
        dataset = self._dataset(piece.prefix)
        first = dataset.document_span(piece.document)[0] + piece.offset
        mask = dataset.loss_mask(first, piece.length) if dataset.has_loss_mask else None
        return readable(self._tokenizer, dataset.tokens(first, piece.length), mask)
