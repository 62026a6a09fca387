"""Which samples a step has, how they are dealt to ranks, and what is laid beside them."""

import threading
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config import RampupSection, TrainSection
from megalite.data.batch_reader import BatchReader
from megalite.data.batch_schedule import BatchSchedule
from megalite.data.collate import SampleRules
from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.writer import IndexedDatasetWriter
from megalite.data.order.streaming import StreamingSamples
from megalite.data.prefetch import Prefetcher
from megalite.errors import UserError

EOD = 0
S = 8


def train_section(batch: int, ramp: tuple[int, int, int] | None = None, micro: int = 1) -> TrainSection:
    rampup = None if ramp is None else RampupSection(start=ramp[0], increment=ramp[1], samples=ramp[2])
    return TrainSection(steps=10, global_batch_size=batch, micro_batch_size=micro, batch_size_rampup=rampup)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> StreamingSamples:
    """Forty documents of 1 to 12 tokens that count up, each ending with EOD."""
    prefix = tmp_path_factory.mktemp("batches") / "corpus"
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for document in range(40):
        writer.add_document([*range(100 * document + 1, 100 * document + 1 + document % 12), EOD])
    writer.finalize()
    return StreamingSamples(IndexedDataset(prefix), sequence_length=S, seed=3)


# ------------------------------------------------------------------------------------------------------------ schedule


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 6), st.integers(1, 500))
def test_a_ramp_up_follows_megatrons_rule(start: int, increment: int, increments: int, ramp_samples: int) -> None:
    whole = start + increment * increments
    schedule = BatchSchedule(train_section(whole, (start, increment, ramp_samples)))
    consumed = 0
    for step in range(1, 60):
        # megatron/core/num_microbatches_calculator.py: as many increments as whole shares are consumed.
        steps_up = int(consumed / (ramp_samples / increments))
        size = min(whole, start + steps_up * increment) if consumed <= ramp_samples else whole
        assert schedule.samples(step) == range(consumed, consumed + size)
        consumed += size
        assert schedule.consumed(step) == consumed


def test_without_a_ramp_up_every_batch_is_whole() -> None:
    schedule = BatchSchedule(train_section(32))
    assert schedule.samples(1) == range(0, 32)
    assert schedule.samples(18_420) == range(18_419 * 32, 18_420 * 32)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 6), st.integers(1, 500), st.integers(0, 30))
def test_a_schedule_goes_on_from_any_of_its_steps(
    start: int, increment: int, increments: int, ramp_samples: int, after: int
) -> None:
    train = train_section(start + increment * increments, (start, increment, ramp_samples))
    whole = BatchSchedule(train)
    rest = BatchSchedule(train, after=after, consumed=whole.consumed(after))
    assert [rest.samples(step) for step in range(after + 1, 60)] == [
        whole.samples(step) for step in range(after + 1, 60)
    ]
    if after:
        with pytest.raises(ValueError, match=f"step {after - 1} lies before step {after}"):
            rest.consumed(after - 1)


# ------------------------------------------------------------------------------------------------------------- dealing


@pytest.mark.parametrize(("data_size", "micro"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 3)])
def test_the_ranks_share_a_batch_and_nothing_twice(samples: StreamingSamples, data_size: int, micro: int) -> None:
    batch = range(24, 48)
    readers = [
        BatchReader(samples, SampleRules(), micro_batch_size=micro, data_rank=rank, data_size=data_size)
        for rank in range(data_size)
    ]
    dealt = [index for reader in readers for indices in reader.slices(batch) for index in indices]
    assert sorted(dealt) == list(batch)
    assert len({len(reader.slices(batch)) for reader in readers}) == 1
    expected = samples.tokens(np.arange(24, 24 + micro))
    first = readers[0].microbatches(batch)[0]
    np.testing.assert_array_equal(first.ids, expected[:, :-1])
    np.testing.assert_array_equal(first.targets, expected[:, 1:])
    assert first.loss_mask is None
    assert first.positions is None
    assert first.cu_seqlens is None


@pytest.mark.parametrize(("data_size", "micro"), [(1, 1), (1, 4), (2, 1), (3, 2), (4, 3)])
@pytest.mark.parametrize("number", [1, 2, 5, 12, 13])
def test_any_number_of_samples_is_read_once_and_filled_up_with_what_does_not_count(
    samples: StreamingSamples, masked: StreamingSamples, data_size: int, micro: int, number: int
) -> None:
    for read in (samples, masked):
        batch = range(3, 3 + number) if read is samples else range(number % read.samples_per_epoch + 1)
        ranks = [
            BatchReader(read, SampleRules(), micro_batch_size=micro, data_rank=rank, data_size=data_size)
            for rank in range(data_size)
        ]
        found = [reader.padded_microbatches(batch) for reader in ranks]
        assert {len(microbatches) for microbatches in found} == {-(-len(batch) // (micro * data_size))}
        filled = len(batch) % (micro * data_size) != 0
        counted: dict[int, np.ndarray] = {}
        for microbatch in (one for microbatches in found for one in microbatches):
            assert microbatch.ids.shape == (micro, S)
            counts = np.ones((micro, S), bool) if microbatch.loss_mask is None else microbatch.loss_mask
            assert (microbatch.loss_mask is None) == (not filled and read is samples)
            for row, sample in enumerate(microbatch.samples):
                np.testing.assert_array_equal(microbatch.ids[row], read.tokens(np.array([sample]))[0, :-1])
                counted[sample] = counted.get(sample, np.zeros(S, int)) + counts[row]
        assert sorted(counted) == list(batch)
        mask = read.loss_mask(np.array(batch))
        expected = np.ones((len(batch), S), int) if mask is None else mask[:, 1:].astype(int)
        np.testing.assert_array_equal(np.stack([counted[sample] for sample in batch]), expected)


# -------------------------------------------------------------------------------------------------------------- rules


def megatrons_masks(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Loss mask, positions and document lengths of one row, found from its EOD tokens as Megatron does."""
    counts, positions, lengths = ids != EOD, np.arange(len(ids)), []
    start = 0
    for end in np.flatnonzero(ids == EOD) + 1:
        positions[end:] = np.arange(len(ids) - end)
        lengths.append(int(end) - start)
        start = int(end)
    return counts, positions, [*lengths, len(ids) - start] if start < len(ids) else lengths


def test_documents_are_laid_out_as_megatron_does(samples: StreamingSamples) -> None:
    rules = SampleRules(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
    batch = rules.microbatch(samples, range(samples.samples_per_epoch))
    assert batch.loss_mask is not None
    assert batch.positions is not None
    assert batch.cu_seqlens is not None
    begins = iter(batch.cu_seqlens.tolist())
    assert next(begins) == 0
    for row, ids in enumerate(batch.ids):
        counts, positions, lengths = megatrons_masks(ids)
        # The last input may end its document; the target beyond it belongs to the next one and does not count.
        np.testing.assert_array_equal(batch.loss_mask[row], counts)
        np.testing.assert_array_equal(batch.positions[row], positions)
        assert [next(begins) for _ in lengths] == [row * S + end for end in accumulate(lengths)]
        assert sum(lengths) == S


def test_each_rule_acts_alone(samples: StreamingSamples) -> None:
    attention = SampleRules(reset_attention_mask=True).microbatch(samples, range(3))
    assert (attention.positions, attention.loss_mask) == (None, None)
    positions = SampleRules(reset_position_ids=True).microbatch(samples, range(3))
    assert (positions.cu_seqlens, positions.loss_mask) == (None, None)
    loss = SampleRules(eod_mask_loss=True).microbatch(samples, range(3))
    assert (loss.cu_seqlens, loss.positions) == (None, None)


@pytest.fixture
def masked(tmp_path: Path) -> StreamingSamples:
    """Tokens whose mask tells odd from even."""
    writer = IndexedDatasetWriter(tmp_path / "chat", np.uint16, with_loss_mask=True)
    tokens = np.arange(100, dtype=np.uint16)
    writer.add_documents(tokens, [60, 40], loss_mask=(tokens % 2).astype(np.uint8))
    writer.finalize()
    return StreamingSamples(IndexedDataset(tmp_path / "chat"), sequence_length=S, seed=3)


def test_a_loss_mask_marks_targets(masked: StreamingSamples) -> None:
    batch = SampleRules().microbatch(masked, range(masked.samples_per_epoch))
    assert batch.loss_mask is not None
    np.testing.assert_array_equal(batch.loss_mask, batch.targets % 2 == 1)


def test_a_loss_mask_and_document_ends_are_both_heeded(masked: StreamingSamples) -> None:
    batch = SampleRules(eod_mask_loss=True).microbatch(masked, range(masked.samples_per_epoch))
    assert batch.loss_mask is not None
    np.testing.assert_array_equal(batch.loss_mask, (batch.targets % 2 == 1) & (batch.ids != 59))


def test_a_token_beyond_the_vocabulary_is_named(samples: StreamingSamples) -> None:
    largest = int(samples.tokens(np.arange(samples.samples_per_epoch)).max())
    everything = range(samples.samples_per_epoch)
    SampleRules(vocab_size=largest + 1).microbatch(samples, everything)
    with pytest.raises(UserError, match=rf"corpus: sample \d+ holds token id {largest}; a vocabulary of {largest}"):
        SampleRules(vocab_size=largest).microbatch(samples, everything)


# --------------------------------------------------------------------------------------------------------- read ahead


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_steps_come_in_order_and_no_further_than_asked(depth: int) -> None:
    read: list[int] = []

    def reading(step: int) -> int:
        read.append(step)
        return 10 * step

    ahead = Prefetcher(reading, depth=depth, last=5)
    assert [ahead.take(step) for step in range(1, 6)] == [10, 20, 30, 40, 50]
    ahead.close()
    assert read == [1, 2, 3, 4, 5]


def test_the_next_steps_are_read_before_they_are_taken() -> None:
    third = threading.Event()
    ahead = Prefetcher(lambda step: third.set() if step == 3 else None, depth=2, last=9)
    ahead.take(1)
    assert third.wait(10)
    ahead.close()


def test_what_the_reading_raises_reaches_the_step() -> None:
    def reading(step: int) -> int:
        if step == 2:
            raise OSError("the disk is gone")
        return step

    ahead = Prefetcher(reading, depth=2, last=9)
    assert ahead.take(1) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(2)
    ahead.close()
