"""The partition of a model's layers into pipeline stages."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def partition(num_layers: int, num_stages: int, stage_layers: Sequence[int] | None = None) -> tuple[range, ...]:
    """Partition layers ``0..num_layers - 1`` into one contiguous range per stage, each of at least one layer.

    Without `stage_layers` the partition is even. Remaining layers go to the middle stages first, since the first and
    the last stage also hold the embedding and the head; the last stage, where head and loss cost most, comes last.

    >>> partition(10, 4)
    (range(0, 2), range(2, 5), range(5, 8), range(8, 10))
    >>> partition(10, 4, stage_layers=(3, 3, 3, 1))
    (range(0, 3), range(3, 6), range(6, 9), range(9, 10))

    Raises ValueError where a stage would hold no layer, where `stage_layers` does not have one number per stage, or
    where its sum is not `num_layers`.
    """
    counts = _even(num_layers, num_stages) if stage_layers is None else tuple(stage_layers)
    if len(counts) != num_stages:
        raise ValueError(f"stage_layers={list(counts)} must hold one number for each of the {num_stages} stages")
    if sum(counts) != num_layers:
        raise ValueError(
            f"stage_layers={list(counts)} adds up to {sum(counts)}, not to the model's {num_layers} layers"
        )
    if min(counts) < 1:
        raise ValueError(f"every stage needs at least one layer, not {list(counts)}")
    return tuple(range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0)))


def _even(num_layers: int, num_stages: int) -> tuple[int, ...]:
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot be split over {num_stages} stages; use 1 to {num_layers}")
    share, remaining = divmod(num_layers, num_stages)
    middle_first = sorted(range(num_stages), key=lambda stage: (abs(2 * stage - (num_stages - 1)), stage))
    larger = set(middle_first[:remaining])
    return tuple(share + (stage in larger) for stage in range(num_stages))
