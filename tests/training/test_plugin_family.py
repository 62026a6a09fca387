"""A model family of a plugin, that of docs/howto/add_a_model_family.md, trains on every axis and resumes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commands import losses, megalite
from parity import check_parity
from plugin_family import NAME, plugin_family

from megalite.checkpoint.discovery import find_checkpoints

pytestmark = pytest.mark.processes

MODEL = (
    f"model={{architecture: {NAME}, vocab_size: 509, hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 8,"
    " num_key_value_heads: 4, intermediate_size: 176, max_position_embeddings: 256}"
)
PLUGIN = f"plugins=[{NAME}]"


@pytest.fixture(autouse=True)
def _package(tmp_path: Path) -> Iterator[None]:
    with plugin_family(tmp_path):
        yield


def test_it_trains_like_one_process(run_file: Path, corpus: Path) -> None:
    check_parity(run_file, corpus, (2, 2, 1), tied=True, model=(PLUGIN, MODEL))


def test_its_run_resumes_and_becomes_a_hugging_face_folder(run_file: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(run_file.read_text()) | {"checkpoint": {"every": 2}}
    run_file.write_text(yaml.safe_dump(content))
    start = ("train", str(run_file), PLUGIN, MODEL, "train.steps=4")
    megalite(*start, f"run.dir={tmp_path / 'whole'}")
    megalite(*start, "train.stop_after=2")
    megalite(*start)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert [step for step, _ in find_checkpoints(tmp_path / "run" / "checkpoints")] == [4, 2]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["plugins"] == [NAME]
    refused = megalite("convert", str(tmp_path / "run"), str(tmp_path / "hf"), status=2)
    assert f"architecture={NAME!r} is not 'llama', 'gpt2' or 'gpt_neox'" in refused.stderr
    done = megalite("convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--plugin", NAME, "--verify")
    assert "verified, the logits" in done.stdout
