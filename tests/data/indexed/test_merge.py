import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.format import HEADER, MAGIC, DatasetSidecar
from megalite.data.indexed.merge import merge_datasets
from megalite.data.indexed.writer import IndexedDatasetWriter
from megalite.data.preprocess.preprocess import preprocess
from megalite.errors import UserError


def write(prefix: Path, documents, dtype: npt.DTypeLike = np.uint16, masks=None, sidecar=None) -> Path:
    with IndexedDatasetWriter(prefix, dtype, with_loss_mask=masks is not None) as writer:
        for number, document in enumerate(documents):
            writer.add_document(document, None if masks is None else masks[number])
        writer.finalize(sidecar)
    return prefix


def write_megatron(prefix: Path, sequences, bounds, modes=None) -> Path:
    """A dataset whose documents have several sequences each, as Megatron writes them."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    offsets = 2 * (np.cumsum(lengths, dtype="<i8") - lengths)
    index = HEADER.pack(MAGIC, 1, 8, len(lengths), len(bounds)) + lengths.tobytes() + offsets.astype("<i8").tobytes()
    index += np.array(bounds, dtype="<i8").tobytes() + (b"" if modes is None else bytes(modes))
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    prefix.with_name(f"{prefix.name}.bin").write_bytes(np.array(sum(sequences, []), dtype="<u2").tobytes())
    return prefix


def files(prefix: Path) -> dict[str, bytes]:
    return {path.suffix: path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}.*")}


def test_merged_is_as_if_written_at_once(tmp_path, sentences, tokenizer_path, write_jsonl):
    parts = [sentences[:100], sentences[100:130], sentences[130:]]
    inputs = [write_jsonl(tmp_path / f"{number}.jsonl", part) for number, part in enumerate(parts)]
    options = {"append_eod": True, "workers": 1, "min_tokens": 8}
    for path in inputs:
        preprocess([path], tokenizer_path, tmp_path / path.stem, **options)
    merge_datasets([tmp_path / str(number) for number in range(3)], tmp_path / "merged")
    preprocess(inputs, tokenizer_path, tmp_path / "whole", **options)
    assert files(tmp_path / "merged") == files(tmp_path / "whole")
    assert set(files(tmp_path / "merged")) == {".bin", ".idx", ".json"}


def test_loss_masks_are_merged(tmp_path):
    first = write(tmp_path / "a", [[1, 2], [3]], masks=[[0, 1], [1]])
    second = write(tmp_path / "b", [[4], []], masks=[[0], []])
    merged = merge_datasets([first, second, first], tmp_path / "merged")
    assert merged.tokens(0, 7).tolist() == [1, 2, 3, 4, 1, 2, 3]
    assert merged.loss_mask(0, 7).tolist() == [0, 1, 1, 0, 0, 1, 1]
    assert merged.document_lengths(range(6)).tolist() == [2, 1, 1, 0, 2, 1]


@pytest.mark.parametrize("with_modes", [False, True])
def test_sequences_and_documents_of_megatron_are_kept(tmp_path, monkeypatch, with_modes):
    monkeypatch.setattr("megalite.data.indexed.merge.BLOCK", 2)
    modes = [0, 1, 0, 1, 1] if with_modes else None
    first = write_megatron(tmp_path / "a", [[1], [2, 3], [], [4], [5, 6]], [0, 2, 2, 5], modes)
    second = write_megatron(tmp_path / "b", [[7], [8, 9]], [0, 1, 2], [1, 0] if with_modes else None)
    merge_datasets([first, second], tmp_path / "merged")
    whole = [[1], [2, 3], [], [4], [5, 6], [7], [8, 9]]
    write_megatron(tmp_path / "whole", whole, [0, 2, 2, 5, 6, 7], [*modes, 1, 0] if modes else None)
    assert files(tmp_path / "merged") == files(tmp_path / "whole")


def sidecar(digest: str = "a" * 64, **changes: int) -> DatasetSidecar:
    return replace(DatasetSidecar(10, digest, 1, 1, max_token_id=9, token_counts_entropy=0.0), **changes)


def test_the_counts_of_sidecars_are_added_up(tmp_path):
    first = write(tmp_path / "a", [[1]], sidecar=sidecar(skipped=1, empty=2, short=3, duplicates=4, eod_id=1))
    second = write(tmp_path / "b", [[3]], sidecar=sidecar(skipped=10, empty=20, short=30, duplicates=40, eod_id=1))
    merged = merge_datasets([first, second], tmp_path / "merged").sidecar
    expected = sidecar(num_tokens=2, num_documents=2, max_token_id=3, skipped=11, empty=22, short=33, duplicates=44)
    assert merged is not None
    assert merged.token_counts_entropy == pytest.approx(np.log(2))
    assert (merged.eod_id, merged.num_tokens, merged.max_token_id) == (1, 2, 3)
    names = ("skipped", "empty", "short", "duplicates", "num_documents")
    assert [getattr(merged, name) for name in names] == [getattr(expected, name) for name in names]


def test_what_does_not_fit_together_is_refused(tmp_path):
    first = write(tmp_path / "a", [[1]], sidecar=sidecar())
    for other, reason in (
        (write(tmp_path / "b", [[1]], np.int32, sidecar=sidecar()), "tokens are int32, .*a has uint16"),
        (write(tmp_path / "c", [[1]], masks=[[1]], sidecar=sidecar()), "has a loss mask, .*a has none"),
        (
            write(tmp_path / "d", [[1]], sidecar=sidecar("b" * 64)),
            "made with tokenizer bbbbbbbbbbbb, .*a with aaaaaaaaaaaa",
        ),
        (write(tmp_path / "e", [[1]]), "has no sidecar that names its tokenizer, .*a has one"),
        (write_megatron(tmp_path / "f", [[1]], [0, 1], [0]), "has modes, .*a has no modes"),
        (write(tmp_path / "g", [[11]], sidecar=sidecar()), "holds token id 11; its sidecar tells 9 as the largest"),
    ):
        with pytest.raises(UserError, match=f"{other.name}.*: {reason}"):
            merge_datasets([first, other], tmp_path / "merged")
        assert not list(tmp_path.glob("merged*"))
    with pytest.raises(UserError, match="a: is to be read and written at once"):
        merge_datasets([first, first], tmp_path / "a")
    with pytest.raises(UserError, match=r"none\.idx: no such file"):
        merge_datasets([first, tmp_path / "none"], tmp_path / "merged")
    with pytest.raises(UserError, match="no dataset is given"):
        merge_datasets([], tmp_path / "merged")


def test_the_tool_merges_and_says_so(tmp_path):
    tool = Path(__file__).parents[3] / "tools" / "merge_datasets.py"
    for name in "ab":
        write(tmp_path / name, [[1, 2]])
    command = [sys.executable, str(tool), str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "all")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'all'}: 2 documents, 4 tokens\n"
    assert IndexedDataset(tmp_path / "all").num_documents == 2
    command[2] = str(tmp_path / "c")
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1


def test_a_merged_dataset_overwrites_only_where_it_may(tmp_path):
    first, second = (write(tmp_path / name, [[1]], sidecar=sidecar()) for name in "ab")
    merge_datasets([first, second], tmp_path / "all", overwrite=False)
    with pytest.raises(
        UserError, match=r"all\.idx: is there already; give another --output, or overwrite it with --force"
    ):
        merge_datasets([first, second], tmp_path / "all", overwrite=False)
    assert merge_datasets([first, first], tmp_path / "all", overwrite=True).num_documents == 2


@pytest.mark.parametrize("edge", ["eod", "bos"])
def test_tokens_at_the_edges_of_documents_are_told_where_all_have_them(tmp_path, edge):
    told: dict[str, Any] = {f"{edge}_id": 2, f"{edge}_token": "<x>", "ignored": {"id": 3}}
    other_counts: dict[str, Any] = {"ignored": {"id": 1, "n": 2}}
    with_edge, without = (
        write(tmp_path / name, [[1]], sidecar=replace(sidecar(), **changes))
        for name, changes in (("a", told), ("b", other_counts))
    )
    same = merge_datasets([with_edge, with_edge], tmp_path / "same").sidecar
    other = merge_datasets([with_edge, without], tmp_path / "other").sidecar
    assert same is not None
    assert other is not None
    assert (getattr(same, f"{edge}_id"), getattr(same, f"{edge}_token"), same.ignored) == (2, "<x>", {"id": 6})
    assert (getattr(other, f"{edge}_id"), getattr(other, f"{edge}_token")) == (None, None)
    assert other.ignored == {"id": 4, "n": 2}
