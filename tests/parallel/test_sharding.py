"""Slices of global tensors: pure arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.parallel.sharding import ShardSpec, local_shards, padded_vocabulary


@given(st.integers(1, 5000), st.sampled_from([1, 2, 4, 8]))
def test_the_slices_of_a_padded_dim_cover_it_once(vocab_size: int, size: int) -> None:
    padded = padded_vocabulary(vocab_size, size)
    spec = ShardSpec("table", (vocab_size, 3), 0, padded)
    slices = [spec.slice(rank, size)[0] for rank in range(size)]
    assert [i for part in slices for i in range(part.start, part.stop)] == list(range(vocab_size))
    assert all(part.stop - part.start <= spec.share(size) == padded // size for part in slices)
    assert padded - vocab_size < 64 * size
    assert padded % (64 * size) == 0


def test_fused_parts_are_stacked_in_order() -> None:
    specs = [ShardSpec("q", (8, 3), 0), ShardSpec("k", (4, 3), 0), ShardSpec("v", (4, 3), 0)]
    placed = list(local_shards(specs, rank=1, size=2))
    assert [shard.source[0] for shard in placed] == [slice(4, 8), slice(2, 4), slice(2, 4)]
    assert [shard.target[0] for shard in placed] == [slice(0, 4), slice(4, 6), slice(6, 8)]


def test_a_replicated_tensor_is_whole_everywhere() -> None:
    spec = ShardSpec("norm.weight", (5,), None)
    assert spec.slice(3, 4) == (slice(0, 5),)
    assert spec.local_shape(4) == (5,)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks do not divide dim 0"):
        ShardSpec("w", (8, 8), 0).slice(0, 3)
