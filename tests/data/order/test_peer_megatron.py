"""Every index and every sample beside Megatron-core's own: `make peers` installs it, without it these are skipped."""

import importlib
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.order.blend import BlendedSamples, megatron_blend, megatron_source_sizes
from megalite.data.order.megatron import MegatronSamples, build_index
from megalite.data.order.streaming import split_documents
from megalite.errors import UserError

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


class Tokenizer:
    """As little as Megatron-core asks for."""

    vocab_size = 70_000
    eod = 0
    unique_identifiers = ("none",)


@pytest.fixture(scope="module")
def megatron():
    """What the tests need of Megatron-core."""
    datasets = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="Megatron-core is not installed")
    modules = SimpleNamespace(
        **{
            name: importlib.import_module(f"megatron.core.datasets.{name}")
            for name in ("blended_megatron_dataset_builder", "blended_megatron_dataset_config", "helpers")
        }
    )

    def config(**settings):
        return datasets.GPTDatasetConfig(
            tokenizer=Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            **settings,
        )

    return SimpleNamespace(
        config=config,
        Builder=modules.blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder,
        GPTDataset=datasets.GPTDataset,
        Dataset=datasets.IndexedDataset,
        Split=datasets.Split,
        build_blending_indices=modules.helpers.build_blending_indices,
        split_vector=modules.blended_megatron_dataset_config.parse_and_normalize_split,
        split_matrix=modules.blended_megatron_dataset_config.convert_split_vector_to_split_matrix,
    )


corpora = st.lists(st.one_of(st.integers(0, 1), st.integers(0, 40)), min_size=1, max_size=40).filter(
    lambda lengths: sum(lengths) > 1
)


def test_every_index_is_theirs(megatron, write_lengths):
    """Lengths with 0 and 1, part of the documents, 1 to 5 epochs and more, the extra token or none, a tail or none."""
    agreed, tripped = 0, 0

    @settings(max_examples=400, deadline=None)
    @given(
        corpora,
        st.integers(2, 16),
        st.integers(0, 2**32 - 1),
        st.one_of(st.none(), st.floats(0.1, 5.5)),
        st.booleans(),
        st.booleans(),
        st.floats(0.2, 1),
    )
    def compare(lengths, sequence_length, seed, epochs, extra, drop_last, share):
        nonlocal agreed, tripped
        stop = max(1, round(share * len(lengths)))
        chosen, epoch = range(stop // 3, stop), sum(lengths[stop // 3 : stop])
        if epoch < 2:
            return
        num_samples = None if epochs is None else max(1, int(epochs * epoch / sequence_length))
        with tempfile.TemporaryDirectory() as folder:
            prefix = Path(folder) / "corpus"
            write_lengths(prefix, lengths)
            config = megatron.config(
                random_seed=seed,
                sequence_length=sequence_length,
                blend=([str(prefix)], None),
                split="1,0,0",
                add_extra_token_to_sequence=extra,
                drop_last_partial_validation_sequence=drop_last,
            )
            theirs = megatron.Dataset(str(prefix))
            split = megatron.Split.train if drop_last else megatron.Split.valid
            documents = np.arange(chosen.start, chosen.stop, dtype=np.int32)
            try:
                theirs = megatron.GPTDataset(theirs, str(prefix), documents, num_samples, split, config)
            except AssertionError:
                # Theirs wants a last document with a token where it keeps the tail.
                assert not drop_last
                assert extra
                tripped += 1
                return
            index = build_index(
                np.array(lengths[chosen.start : chosen.stop], np.int32),
                sequence_length=sequence_length,
                seed=seed,
                num_samples=num_samples,
                first=chosen.start,
                extra_token=extra,
                drop_last=drop_last,
            )
        for name, ours in index.items():
            assert ours.dtype == getattr(theirs, name).dtype
            assert ours.tolist() == getattr(theirs, name).tolist()
        agreed += 1

    compare()
    assert agreed > 20 * tripped


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("extra", [True, False])
def test_every_sample_is_theirs(megatron, tmp_path, write_lengths, seed, extra):
    draw = np.random.default_rng(seed)
    lengths = draw.choice([0, 1, 2, 9, 40, 150], 80).tolist()
    sequence_length, num_samples, shares = int(draw.integers(2, 50)), int(draw.integers(1, 400)), (0.9, 0.06, 0.04)
    indexed = write_lengths(tmp_path / "corpus", lengths)
    config = megatron.config(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([str(indexed.prefix)], None),
        split=",".join(map(str, shares)),
        add_extra_token_to_sequence=extra,
    )
    theirs = megatron.Builder(megatron.GPTDataset, [num_samples] * 3, lambda: True, config).build()
    for documents, part in zip(split_documents(indexed.num_sequences, shares), theirs, strict=True):
        lay = partial(
            MegatronSamples,
            indexed,
            sequence_length=sequence_length,
            seed=seed,
            num_samples=num_samples,
            documents=documents,
            extra_token=extra,
        )
        if sum(lengths[documents.start : documents.stop]) < sequence_length + extra:
            # Theirs makes its samples of several epochs.
            with pytest.raises(UserError, match="give more text"):
                lay()
            continue
        ours = lay()
        assert ours.num_samples == len(part)
        rows = [part[index] for index in range(len(part))]
        tokens = ours.tokens(np.arange(len(part)))
        assert (tokens[:, :-1] == np.stack([row["tokens"] for row in rows])).all()
        assert (tokens[:, 1:] == np.stack([row["labels"] for row in rows])).all()
        mask = ours.loss_mask(np.arange(len(part)))
        counts = np.stack([row["loss_mask"] for row in rows])
        assert (counts == (1 if mask is None else mask[:, 1:])).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 9), st.floats(1e-3, 1e3)), min_size=1, max_size=12), st.integers(1, 5000))
def test_every_blend_is_theirs(megatron, weights, num_samples):
    shares = np.array(weights, dtype=np.float64) / np.sum(np.array(weights, dtype=np.float64))
    source, within = np.zeros(num_samples, np.int16), np.zeros(num_samples, np.int64)
    megatron.build_blending_indices(source, within, shares.tolist(), len(weights), num_samples, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megalite.data.order.blend._STEPS_A_LANE", 100)
        index = megatron_blend(shares, num_samples)
    assert (index["dataset_index"] == source).all()
    assert (index["dataset_sample_index"] == within).all()


@pytest.mark.parametrize("seed", range(8))
def test_every_blended_sample_is_theirs(megatron, tmp_path, write_lengths, seed):
    draw = np.random.default_rng(seed)
    number, sequence_length, shares = int(draw.integers(2, 6)), int(draw.integers(2, 20)), (0.8, 0.15, 0.05)
    datasets: list[IndexedDataset] = [
        write_lengths(tmp_path / f"corpus{part}", draw.integers(0, 60, draw.integers(60, 150)).tolist())
        for part in range(number)
    ]
    weights = [draw.integers(1, 10, number).tolist(), draw.random(number).tolist()][seed % 2]
    sizes = [int(size) for size in draw.integers(20, 900, 3)]
    config = megatron.config(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([str(indexed.prefix) for indexed in datasets], weights),
        split=",".join(map(str, shares)),
    )
    theirs = megatron.Builder(megatron.GPTDataset, sizes, lambda: True, config).build()
    for split, (size, blend) in enumerate(zip(sizes, theirs, strict=True)):
        parts = [
            MegatronSamples(
                indexed,
                sequence_length=sequence_length,
                seed=seed,
                num_samples=asked,
                documents=split_documents(indexed.num_sequences, shares)[split],
            )
            for indexed, asked in zip(datasets, megatron_source_sizes(size, weights), strict=True)
        ]
        ours = BlendedSamples(parts, weights, order="megatron", num_samples=len(blend))
        assert len(blend) >= size
        rows = [blend[index] for index in range(len(blend))]
        source, within = ours.locate(np.arange(len(blend)))
        assert source.tolist() == [row["dataset_id"] for row in rows]
        assert within.tolist() == blend.dataset_sample_index.tolist()
        tokens = ours.tokens(np.arange(len(blend)))
        assert (tokens[:, :-1] == np.stack([row["tokens"] for row in rows])).all()
        assert (tokens[:, 1:] == np.stack([row["labels"] for row in rows])).all()


@pytest.mark.parametrize(
    "shares", [(0.98, 0.01, 0.01), (969, 30, 1), (1, 1, 1), (0.7, 0.3), (3, 0, 1), (1 / 3, 0.1, 7)]
)
def test_every_split_is_theirs(megatron, shares):
    matrix = megatron.split_matrix(megatron.split_vector(",".join(map(str, shares))))
    for documents in (0, 1, 2, 3, 10, 999, 10_000, 123_457, 999_999_937):
        for ours, theirs in zip(split_documents(documents, shares), matrix, strict=False):
            bounds = (0, 0) if theirs is None else tuple(int(round(end * float(documents))) for end in theirs)
            assert len(ours) == bounds[1] - bounds[0]
            assert theirs is None or (ours.start, ours.stop) == bounds
