"""A tokenizer for the small models, and a checkpoint of one."""

from pathlib import Path

import pytest
from generating import LLAMA, save_model, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def llama_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_bytes: bytes) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "step_0"
    save_model(folder, LLAMA, tokenizer_bytes)
    return folder
