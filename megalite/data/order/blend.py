"""Several sources read as one, by weights: which source gives sample i, and which of its samples."""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from megalite.data.order.index_cache import Arrays, cached_arrays
from megalite.data.order.streaming import Piece, Samples
from megalite.errors import UserError

EXACT_PERIOD = 1 << 16
LONGEST_PERIOD = 1 << 20
_STEPS_FOR_THE_SMALLEST = 50
_LANES = 1 << 12
_STEPS_A_LANE = 1 << 10


class BlendedSamples:
    """Samples of several sources in proportion to their weights; each source is read in its own order.

    In the order `streaming` there is no end unless `num_samples` sets one, and the source of any sample is found by
    arithmetic (`StreamingBlend`). In the order `megatron` it is Megatron-core's greedy choice (`megatron_blend`), kept
    in `cache_dir`; `num_samples` must be given, and every source must have the samples that it is asked for (size them
    with `megatron_source_sizes`). Raises UserError where one has not, and where a weight is not above 0.
    """

    def __init__(
        self,
        sources: Sequence[Samples],
        weights: Sequence[float],
        *,
        order: Literal["streaming", "megatron"],
        num_samples: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        if not sources or len(sources) != len(weights):
            raise ValueError(f"{len(sources)} sources and {len(weights)} weights")
        if not all(0 < weight < math.inf for weight in weights):
            raise UserError(
                f"data.train: weights {list(weights)} found; each must be above 0; leave a source out instead"
            )
        self._sources = tuple(sources)
        self.sequence_length = sources[0].sequence_length
        self.samples_per_epoch = sum(source.samples_per_epoch for source in sources)
        self.num_samples = num_samples
        self.has_loss_mask = any(source.has_loss_mask for source in sources)
        if order == "streaming":
            self._blend = StreamingBlend(weights)
        elif num_samples is None:
            raise ValueError("Megatron's order needs the number of samples")
        else:
            self._blend = MegatronBlend(weights, num_samples, cache_dir)
        if num_samples is not None:
            self._check_sizes(num_samples)

    def counts(self, num_samples: int) -> list[int]:
        """Return how many of the first `num_samples` samples each source gives; they add up to `num_samples`."""
        return self._blend.counts(num_samples).tolist()

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each sample and its index there, int64[n] to two of int64[n].

        Raises IndexError below 0 and from `num_samples` on.
        """
        if len(indices) and (indices.min() < 0 or indices.max() >= (self.num_samples or math.inf)):
            raise IndexError(f"{indices.min()}..{indices.max()} are not all in 0..{self.num_samples}")
        return self._blend.locate(indices)

    def tokens(self, indices: np.ndarray) -> np.ndarray:
        """Return samples, int64[n] to int64[n, sequence_length + 1]; raise IndexError as `locate`."""
        rows = np.empty((len(indices), self.sequence_length + 1), np.int64)
        for source, places, within in self._parts(indices):
            rows[places] = source.tokens(within)
        return rows

    def loss_mask(self, indices: np.ndarray) -> np.ndarray | None:
        """Return which tokens are targets that count, uint8[n, sequence_length + 1]; None where no source has a mask.

        What comes from sources without a mask counts in full.
        """
        if not self.has_loss_mask:
            return None
        rows = np.ones((len(indices), self.sequence_length + 1), np.uint8)
        for source, places, within in self._parts(indices):
            mask = source.loss_mask(within)
            if mask is not None:
                rows[places] = mask
        return rows

    def pieces(self, index: int) -> list[Piece]:
        """Return the documents of a sample, in order; raise IndexError as `locate`."""
        source, within = self.locate(np.array([index]))
        return self._sources[source[0]].pieces(int(within[0]))

    def _parts(self, indices: np.ndarray) -> list[tuple[Samples, np.ndarray, np.ndarray]]:
        chosen, within = self.locate(indices)
        places = {number: np.flatnonzero(chosen == number) for number in np.unique(chosen).tolist()}
        return [(self._sources[number], at, within[at]) for number, at in places.items()]

    def _check_sizes(self, num_samples: int) -> None:
        for number, (source, asked) in enumerate(zip(self._sources, self.counts(num_samples), strict=True)):
            if source.num_samples is not None and source.num_samples < asked:
                raise UserError(
                    f"data.train[{number}]: has {source.num_samples} samples, but {asked} of {num_samples} are its "
                    "share; give it a smaller weight, or take data.order=streaming"
                )


class StreamingBlend:
    """A blend without end whose every place is found by arithmetic.

    With weights as whole numbers that add up to a period P, sample k of source d stands between the places
    ``(k - 1) * P / w_d`` and ``k * P / w_d``, the earliest due first, which is always possible (Tijdeman, The chairman
    assignment problem, 1980; the windows are those of Pfair scheduling, Baruah et al. 1996). So among the first n
    samples, for every n, source d has its share ``n * w_d / P`` rounded down or up, and exactly w_d in each period.

    Weights are taken as they are written in decimals, exactly, for a period of up to 2^16. Above, they are rounded to
    whole numbers of a period P of about 2^16 to 2^20: each share is then off by less than 1 / P, and by less than 2%
    of itself where it is more than 50 / 2^20. A source with less than 1 / P is read once a period, at the cost of the
    others.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights: np.ndarray = np.array(whole_weights(weights), dtype=np.int64)
        """How many samples of a period each source gives: int64[sources]."""
        self.period = int(self.weights.sum())
        self._source = _earliest_due_first(self.weights)
        self._within = _occurrences(self._source, len(weights))

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each place and how often it came before: int64[n] to two of int64[n]."""
        periods, places = np.divmod(indices, self.period)
        sources = self._source[places].astype(np.int64)
        return sources, periods * self.weights[sources] + self._within[places]

    def counts(self, num_samples: int) -> np.ndarray:
        """Return how often each source comes among the first `num_samples`: int64[sources]."""
        periods, rest = divmod(num_samples, self.period)
        return periods * self.weights + np.bincount(self._source[:rest], minlength=len(self.weights))


class MegatronBlend:
    """Megatron-core's blend of `num_samples` samples, kept in `cache_dir` (`megatron_blend`)."""

    def __init__(self, weights: Sequence[float], num_samples: int, cache_dir: Path | None) -> None:
        self._num_sources = len(weights)
        # Megatron-core divides by the sum twice, and the second time may move a last bit.
        shares = _normalized(_normalized(np.array(weights, dtype=np.float64)))
        facts = {"order": "megatron", "shares": [share.hex() for share in shares.tolist()], "num_samples": num_samples}
        index = cached_arrays(cache_dir, "blend", facts, lambda: megatron_blend(shares, num_samples))
        self._source, self._within = index["dataset_index"], index["dataset_sample_index"]

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each place and how often it came before: int64[n] to two of int64[n]."""
        return self._source[indices].astype(np.int64), self._within[indices].astype(np.int64)

    def counts(self, num_samples: int) -> np.ndarray:
        """Return how often each source comes among the first `num_samples`: int64[sources]."""
        return np.bincount(self._source[:num_samples], minlength=self._num_sources)


def megatron_blend(shares: np.ndarray, num_samples: int) -> Arrays:
    """Build Megatron-core's `dataset_index` and `dataset_sample_index`; `shares`, float64[sources], add up to 1.

    Step i takes the source with the largest ``share * max(i, 1) - count`` in float64, the first of equals. Each step
    needs the counts before it, yet the choices soon forget with which counts they began: so neighbouring stretches run
    side by side from guessed counts, and a stretch that began with others than the one before it ended with runs
    again from those, until all agree. The outcome is that of the loop, bit for bit.
    """
    lanes = max(1, min(_LANES, num_samples // _STEPS_A_LANE))
    steps = -(-num_samples // lanes)
    first = np.arange(lanes) * steps
    before = _guess_counts(shares, first)
    after = np.empty_like(before)
    source = np.empty((steps, lanes), np.int16)
    within = np.empty((steps, lanes), np.int32 if num_samples <= np.iinfo(np.int32).max else np.int64)
    stale = np.arange(lanes)
    while len(stale):
        counts, rows = before[stale].astype(np.float64), np.arange(len(stale))
        for step in range(steps):
            chosen = np.argmax(shares * np.maximum(first[stale] + step, 1.0)[:, None] - counts, axis=1)
            source[step, stale], within[step, stale] = chosen, counts[rows, chosen]
            counts[rows, chosen] += 1
        after[stale] = counts
        stale = 1 + np.flatnonzero((before[1:] != after[:-1]).any(axis=1))
        before[stale] = after[stale - 1]
    return {
        "dataset_index": source.T.reshape(-1)[:num_samples],
        "dataset_sample_index": within.T.reshape(-1)[:num_samples],
    }


def megatron_source_sizes(num_samples: int, weights: Sequence[float]) -> list[int]:
    """Return with how many samples Megatron-core builds the sources of a blend: their shares of all, and 0.5% more."""
    shares = _normalized(np.array(weights, dtype=np.float64))
    return [math.ceil(math.ceil(num_samples * share) * 1.005) for share in shares.tolist()]


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Return weights as whole numbers in the same proportion, or near it (`StreamingBlend`)."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    total = sum(whole)
    if total <= EXACT_PERIOD:
        return whole
    wanted = _STEPS_FOR_THE_SMALLEST * total // min(whole)
    period = min(max(EXACT_PERIOD, 1 << wanted.bit_length()), LONGEST_PERIOD)
    rounded = [max(1, weight * period // total) for weight in whole]
    # What rounding down has left over goes where most was cut off, which is nowhere that was rounded up.
    rests = [weight * period % total if weight * period >= total else 0 for weight in whole]
    by_rest = sorted(range(len(whole)), key=lambda number: -rests[number])
    for number in by_rest[: max(0, period - sum(rounded))]:
        rounded[number] += 1
    return rounded


def _normalized(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def _guess_counts(shares: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Counts near the shares of so many samples, which add up to them: int64[lanes] to int64[lanes, sources]."""
    exact = shares * first[:, None]
    counts = np.floor(exact).astype(np.int64)
    ranks = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1, kind="stable")
    return counts + (ranks < (first - counts.sum(axis=1))[:, None])


def _earliest_due_first(weights: np.ndarray) -> np.ndarray:
    """The source of each place of a period: int16[period]."""
    period, number = int(weights.sum()), len(weights)
    sources = np.repeat(np.arange(number), weights)
    ordinals = np.arange(period) - np.repeat(np.cumsum(weights) - weights, weights)
    opens = ordinals * period // weights[sources]
    due = -(-(ordinals + 1) * period // weights[sources])
    by_opening = np.argsort(opens, kind="stable")
    keys, opens = (due * number + sources)[by_opening].tolist(), opens[by_opening].tolist()
    order, waiting, upcoming = [], [], 0
    for place in range(period):
        while upcoming < period and opens[upcoming] <= place:
            heapq.heappush(waiting, keys[upcoming])
            upcoming += 1
        order.append(heapq.heappop(waiting) % number)
    return np.array(order, dtype=np.int16)


def _occurrences(sources: np.ndarray, number: int) -> np.ndarray:
    """How often the source of each place came before it: int64[n]."""
    within = np.empty(len(sources), np.int64)
    for source in range(number):
        places = np.flatnonzero(sources == source)
        within[places] = np.arange(len(places))
    return within
