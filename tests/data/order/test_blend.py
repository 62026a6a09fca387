import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.order.blend import (
    LONGEST_PERIOD,
    BlendedSamples,
    MegatronBlend,
    StreamingBlend,
    megatron_blend,
    megatron_source_sizes,
    whole_weights,
)
from megalite.data.order.megatron import MegatronSamples
from megalite.data.order.streaming import StreamingSamples
from megalite.errors import UserError


def slow_blend(shares, num_samples):
    """Megatron-core's rule, a sample at a time, in float64."""
    counts, sources, within = [0] * len(shares), [], []
    for step in range(num_samples):
        errors = [share * max(float(step), 1.0) - float(count) for share, count in zip(shares, counts, strict=True)]
        chosen = errors.index(max(errors))
        sources.append(chosen)
        within.append(counts[chosen])
        counts[chosen] += 1
    return sources, within


def located(blend, indices):
    return [part.tolist() for part in blend.locate(indices)]


def test_the_golden_blend_of_megatron():
    blend = MegatronBlend([30, 70], 10, None)
    assert located(blend, np.arange(10)) == [[1, 0, 1, 1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 2, 1, 3, 4, 2, 5, 6]]
    assert blend.counts(10).tolist() == [3, 7]
    assert blend.counts(4).tolist() == [1, 3]


weights = st.lists(st.one_of(st.integers(1, 9), st.floats(1e-3, 1e3), st.integers(1, 10**12)), min_size=1, max_size=9)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(weights, st.integers(1, 400), st.integers(1, 8), st.integers(1, 20))
def test_the_blend_is_that_of_the_rule(weights, num_samples, lanes, steps):
    shares = np.array(weights, dtype=np.float64) / np.sum(np.array(weights, dtype=np.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megalite.data.order.blend._LANES", lanes)
        patch.setattr("megalite.data.order.blend._STEPS_A_LANE", steps)
        index = megatron_blend(shares, num_samples)
    assert [part.tolist() for part in index.values()] == list(slow_blend(shares.tolist(), num_samples))


def test_a_blend_in_many_lanes_is_that_of_the_rule(monkeypatch):
    monkeypatch.setattr("megalite.data.order.blend._STEPS_A_LANE", 64)
    shares = np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    index = megatron_blend(shares, 30_011)
    assert [part.tolist() for part in index.values()] == list(slow_blend(shares.tolist(), 30_011))
    assert (index["dataset_index"].dtype, index["dataset_sample_index"].dtype) == (np.int16, np.int32)


def test_wrong_guesses_are_mended(monkeypatch):
    monkeypatch.setattr("megalite.data.order.blend._STEPS_A_LANE", 10)
    monkeypatch.setattr(
        "megalite.data.order.blend._guess_counts", lambda shares, first: first[:, None] * np.array([1, 0, 0])
    )
    shares = np.array([0.2, 0.3, 0.5])
    index = megatron_blend(shares, 500)
    assert [part.tolist() for part in index.values()] == list(slow_blend(shares.tolist(), 500))


def test_sizes_of_sources_are_megatrons():
    assert megatron_source_sizes(1000, [30, 70]) == [302, 704]
    assert megatron_source_sizes(1001, [30, 70]) == [303, 705]


@settings(max_examples=200, deadline=None)
@given(weights)
def test_any_stretch_of_the_stream_holds_its_share(weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megalite.data.order.blend.EXACT_PERIOD", 300)
        patch.setattr("megalite.data.order.blend.LONGEST_PERIOD", 2048)
        blend = StreamingBlend(weights)
    sources, within = blend.locate(np.arange(2 * blend.period + 5))
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    assert (within == counts[np.arange(len(sources)), sources] - 1).all()
    assert (counts[blend.period - 1] == blend.weights).all()
    ends = np.arange(1, len(sources) + 1)
    assert (np.abs(counts * blend.period - ends[:, None] * blend.weights) < blend.period).all()
    for end in (0, 1, blend.period, blend.period + 3, len(sources)):
        assert blend.counts(end).tolist() == (counts[end - 1] if end else 0 * counts[0]).tolist()


def test_a_place_far_out_is_found_at_once():
    blend = StreamingBlend([30, 70])
    assert blend.period == 10
    sources, within = blend.locate(np.array([3, 10**15 + 3]))
    assert sources[0] == sources[1]
    assert within[1] - within[0] == 10**14 * blend.weights[sources[0]]
    assert blend.counts(10**15).tolist() == [3 * 10**14, 7 * 10**14]


def test_weights_are_taken_as_they_are_written():
    assert whole_weights([0.3, 0.7]) == [3, 7]
    assert whole_weights([30.0, 70]) == [3, 7]
    assert whole_weights([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert whole_weights([1]) == [1]
    assert whole_weights([2.5, 1e-3]) == [2500, 1]
    assert whole_weights([1e9, 2e9, 3e9]) == [1, 2, 3]
    assert whole_weights([np.float64(0.3), np.float64(0.7)]) == [3, 7]


@pytest.mark.parametrize("seed", range(20))
def test_long_periods_are_rounded_within_the_bound(seed):
    weights = np.random.default_rng(seed).lognormal(20, 2.5, 12).tolist()
    whole = np.array(whole_weights(weights))
    shares = np.array(weights) / sum(weights)
    period = whole.sum()
    assert period <= LONGEST_PERIOD
    assert np.abs(whole / period - shares).max() < 1 / period
    ample = shares > 50 / LONGEST_PERIOD
    assert np.abs(whole / period / shares - 1)[ample].max() < 0.02


def test_no_source_is_left_out():
    assert whole_weights([1e-12, 1.0]) == [1, LONGEST_PERIOD - 1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, write_lengths):
    """Three streaming sources of different sizes, the second with a loss mask."""
    folder = tmp_path_factory.mktemp("blend")
    datasets = [
        write_lengths(folder / name, lengths, masked=name == "b")
        for name, lengths in (("a", [50] * 4), ("b", [7] * 90), ("c", [1, 400]))
    ]
    return [StreamingSamples(indexed, sequence_length=8, seed=seed) for seed, indexed in enumerate(datasets)]


def test_a_blend_reads_each_source_in_its_order(sources):
    blend = BlendedSamples(sources, [0.2, 0.5, 0.3], order="streaming")
    assert (blend.sequence_length, blend.num_samples) == (8, None)
    assert blend.samples_per_epoch == sum(source.samples_per_epoch for source in sources)
    indices = np.random.default_rng(0).integers(0, 500, 200)
    chosen, within = blend.locate(indices)
    tokens, mask = blend.tokens(indices), blend.loss_mask(indices)
    assert mask is not None
    assert tokens.dtype == np.int64
    for row, (source, index) in enumerate(zip(chosen, within, strict=True)):
        assert (tokens[row] == sources[source].tokens(np.array([index]))[0]).all()
        expected = tokens[row] % 3 == 0 if source == 1 else np.ones(9)
        assert (mask[row] == expected).all()
        assert blend.pieces(int(indices[row])) == sources[source].pieces(int(index))
    for source in range(3):
        read = np.sort(blend.locate(np.arange(500))[1][blend.locate(np.arange(500))[0] == source])
        assert read.tolist() == list(range(blend.counts(500)[source]))
    assert blend.tokens(np.empty(0, np.int64)).shape == (0, 9)


def test_a_blend_of_sources_without_masks_has_none(sources):
    blend = BlendedSamples([sources[0], sources[2]], [1, 1], order="streaming")
    assert blend.loss_mask(np.arange(20)) is None


def test_megatrons_blend_of_megatrons_samples(tmp_path, sources):
    sizes = megatron_source_sizes(100, [1, 2, 4])
    parts = [
        MegatronSamples(source._indexed, sequence_length=8, seed=1, num_samples=size)
        for source, size in zip(sources, sizes, strict=True)
    ]
    expected = slow_blend([1 / 7, 2 / 7, 4 / 7], 100)
    blends = [BlendedSamples(parts, [1, 2, 4], order="megatron", num_samples=100, cache_dir=tmp_path) for _ in range(2)]
    assert all(located(blend, np.arange(100)) == list(expected) for blend in blends)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    assert blends[1].counts(100) == [expected[0].count(source) for source in range(3)]
    row = blends[1].tokens(np.array([42]))[0]
    assert (row == parts[expected[0][42]].tokens(np.array([expected[1][42]]))[0]).all()


def test_samples_beyond_the_ends_are_refused(sources):
    for order in ("streaming", "megatron"):
        blend = BlendedSamples(sources, [1, 1, 1], order=order, num_samples=20)
        for index in (-1, 20):
            with pytest.raises(IndexError, match=r"are not all in 0\.\.20"):
                blend.tokens(np.array([3, index]))


def test_a_source_that_is_too_small_is_named(sources):
    small = MegatronSamples(sources[0]._indexed, sequence_length=8, seed=1, num_samples=5)
    with pytest.raises(UserError, match=r"data\.train\[1\]: has 24 samples, but 50 of 100 are its share"):
        BlendedSamples([sources[1], small], [1, 1], order="megatron", num_samples=100)


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_weights_above_0_are_asked_for(sources, weight):
    with pytest.raises(UserError, match=r"data\.train: weights .* found; each must be above 0"):
        BlendedSamples(sources, [1, weight, 1], order="streaming")


def test_a_call_that_cannot_be_meant_is_refused(sources):
    with pytest.raises(ValueError, match="3 sources and 2 weights"):
        BlendedSamples(sources, [1, 1], order="streaming")
    with pytest.raises(ValueError, match="needs the number of samples"):
        BlendedSamples(sources, [1, 1, 1], order="megatron")
