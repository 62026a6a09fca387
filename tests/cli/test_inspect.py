"""``megalite inspect PREFIX``: what it says of a dataset, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from megalite.cli import main
from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.statistics import length_histogram, readable
from megalite.data.indexed.writer import IndexedDatasetWriter
from megalite.data.tokenizers.load import load_tokenizer
from megalite.data.tokenizers.train_sentencepiece import train_sentencepiece

LENGTHS = [0, 1, 2, 3, 3, 4, 7, 8, 100, 5]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    writer = IndexedDatasetWriter(tmp_path / "corpus", np.uint16)
    for length in LENGTHS:
        writer.add_document(np.arange(length, dtype=np.uint16))
    writer.finalize()
    return tmp_path / "corpus"


def test_lengths_are_counted(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.data.indexed.statistics._BLOCK", 3)
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
    assert "tokens a document: 0 at least, a median of 3, 13.3 on average, 100 at most" in out
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


def test_control_tokens_and_what_counts_are_shown(tmp_path: Path) -> None:
    text, tokenizer = tmp_path / "a.jsonl", tmp_path / "tok.model"
    text.write_text("".join(json.dumps({"text": f"the number {n} follows {n - 1}\n"}) + "\n" for n in range(200)))
    train_sentencepiece([text], vocab_size=300, output=tokenizer, control_tokens=["<end>"])
    loaded = load_tokenizer(tokenizer)
    end = loaded.token_id("<end>")
    ask, answer = loaded.encode_plain("the number"), loaded.encode_plain("follows")
    assert end is not None
    tokens = np.array([*ask, end, *answer, end])
    assert readable(loaded, tokens) == "the number<end>follows<end>"
    mask = np.array([0] * (len(ask) + 1) + [1] * (len(answer) + 1))
    assert readable(loaded, tokens, mask) == "the number<end>«follows<end>»"
    assert readable(loaded, tokens, 1 - mask) == "«the number<end>»follows<end>"


@pytest.mark.parametrize("words", [["--step", "3"], ["--rank", "0"], ["--json"]])
def test_what_is_asked_of_a_run_is_refused_of_a_dataset(
    prefix: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(prefix), *words]) == 2
    assert capsys.readouterr().err == (
        f"megalite: error: {words[0]}: {prefix} is a dataset, of which it says nothing; leave it out\n"
    )


def test_a_file_of_a_dataset_is_told_its_prefix(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{prefix}.idx"]) == 2
    assert capsys.readouterr().err.endswith(f"; a prefix has no .idx, use {prefix}\n")


def test_a_damaged_token_without_a_digest_is_found(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"vocab_size": 100, "tokenizer_sha256": "0", "num_tokens": 133, "num_documents": 10, "max_token_id": 99}
    Path(f"{prefix}.json").write_text(json.dumps(told | {"token_counts_entropy": 1.0}))
    assert main(["inspect", str(prefix)]) == 0
    with Path(f"{prefix}.bin").open("r+b") as tokens:
        tokens.write(b"\xff\xff")
    assert main(["inspect", str(prefix)]) == 2
    assert "holds token id 65535; its sidecar tells 99 as the largest" in capsys.readouterr().err


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
