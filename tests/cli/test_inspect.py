"""``megalite inspect PREFIX``: what it says of a dataset, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from megalite.cli import main
from megalite.data.indexed import IndexedDataset
from megalite.data.inspection import length_histogram
from megalite.data.tokenizer import train_sentencepiece
from megalite.data.writer import IndexedDatasetWriter

LENGTHS = [0, 1, 2, 3, 3, 4, 7, 8, 100, 5]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    writer = IndexedDatasetWriter(tmp_path / "corpus", np.uint16)
    for length in LENGTHS:
        writer.add_document(np.arange(length, dtype=np.uint16))
    writer.finalize()
    return tmp_path / "corpus"


def test_lengths_are_counted(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.data.inspection._BLOCK", 3)
    histogram = length_histogram(IndexedDataset(prefix))
    assert histogram.bins()[:4] == [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert histogram.documents.tolist() == [1, 1, 3, 3, 1, 0, 0, 1]
    assert histogram.tokens.tolist() == [0, 1, 8, 16, 8, 0, 0, 100]
    assert (histogram.shortest, histogram.median, histogram.longest) == (0, 3, 100)
    assert histogram.mean == sum(LENGTHS) / len(LENGTHS)


def test_a_dataset_is_shown(prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "lengths.png"
    assert main(["inspect", str(prefix), "--plot", str(picture), "--documents", "4"]) == 0
    out = capsys.readouterr().out
    assert f"{prefix}: 10 documents, 133 tokens of uint16, 0.0 MB; the index is sound" in out
    assert "tokens a document: 0 at least, 3 in the middle, 13.3 on average, 100 at most" in out
    assert "document 3, 3 tokens: 0 1 2" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_text_is_decoded_by_the_datasets_own_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, prefix, tokenizer = tmp_path / "a.jsonl", tmp_path / "corpus", tmp_path / "tok.model"
    text.write_text("".join(json.dumps({"text": f"the number {n} follows {n - 1}\n"}) + "\n" for n in range(200)))
    train_sentencepiece([text], vocab_size=300, output=tokenizer)
    assert main(["preprocess", str(text), "--tokenizer", str(tokenizer), "--output", str(prefix)]) == 0
    assert main(["inspect", str(prefix), "--tokenizer", str(tokenizer)]) == 0
    assert "tokens: the number 0 follows -1" in capsys.readouterr().out
    train_sentencepiece([text], vocab_size=301, output=tokenizer)
    assert main(["inspect", str(prefix), "--tokenizer", str(tokenizer)]) == 2
    assert f"{tokenizer}: not the tokenizer of {prefix}" in capsys.readouterr().err


def test_a_broken_index_is_named(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    content[34] ^= 1
    index.write_bytes(content)
    assert main(["inspect", str(prefix)]) == 2
    assert f"{index}: sequence 0" in capsys.readouterr().err


def test_the_tokens_without_their_index_are_a_missing_index(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(f"{prefix}.idx").unlink()
    assert main(["inspect", str(prefix)]) == 2
    assert "corpus.idx: no such file" in capsys.readouterr().err
