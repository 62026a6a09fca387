import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.writer import IndexedDatasetWriter
from megalite.data.tokenizers.train_sentencepiece import train_sentencepiece

SENTENCE = "the quick brown fox jumps over the lazy dog while seven wizards quietly box 42 jugs of liquid"
WORDS = SENTENCE.split()


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """A few hundred short documents, all different."""
    return [
        " ".join(WORDS[(start * 7 + step * (1 + start % 5)) % len(WORDS)] for step in range(5 + start % 9))
        + f" {start}.\n"
        for start in range(300)
    ]


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Sequence[str]], Path]:
    """Write documents as jsonl under the key ``text``."""

    def write(path: Path, texts: Sequence[str]) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory, sentences, write_jsonl) -> Path:
    """A sentencepiece model of 400 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(folder / "corpus.jsonl", sentences)
    train_sentencepiece([corpus], vocab_size=400, output=folder / "tok.model")
    return folder / "tok.model"


@pytest.fixture(scope="session")
def write_lengths() -> Callable[..., IndexedDataset]:
    """Write documents of these lengths over the stream 0, 1, 2, ...; with `masked`, every third token counts."""

    def write(prefix: Path, lengths: Sequence[int], *, masked: bool = False) -> IndexedDataset:
        tokens = np.arange(sum(lengths), dtype=np.int32)
        with IndexedDatasetWriter(prefix, "i4") as writer:
            writer.add_documents(tokens, lengths)
            writer.finalize()
        if masked:
            (tokens % 3 == 0).astype(np.uint8).tofile(prefix.with_name(f"{prefix.name}.mask"))
        return IndexedDataset(prefix)

    return write
