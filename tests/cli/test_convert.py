"""``megalite convert``: both directions with proof, and nothing under the final name that was not whole."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megalite.cli import main
from megalite.convert.open import open_weights
from megalite.data.tokenizers.load import load_tokenizer
from megalite.data.tokenizers.train_sentencepiece import train_sentencepiece

LLAMA: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as transformers saves it, in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source") / "llama"
    LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(Path(__file__).read_text())
    train_sentencepiece([folder / "text.txt"], vocab_size=400, output=folder / "tok.model")
    return folder / "tok.model"


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """Whatever happens, no temporary folder stays."""
    yield
    assert list(tmp_path.rglob("*.tmp")) == []


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_there_and_back_with_proof(
    source: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held, back = tmp_path / "held", tmp_path / "back"
    assert main(["convert", str(source), str(held), "--verify", "--tokenizer", str(tokenizer)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{held}: 41,120 parameters, 0.2 MB, a checkpoint; verified, the logits of 128 tokens differ")
    assert float(out.split("at most ")[1]) < 1e-5
    assert (held / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert main(["convert", str(held), str(back), "--verify", "--max-shard-size", "50KB"]) == 0
    assert "a Hugging Face folder in fp32; verified, the logits" in capsys.readouterr().out
    assert len(list(back.glob("*.safetensors"))) > 1
    theirs = load_file(source / "model.safetensors")
    ours = {name: array for file in back.glob("*.safetensors") for name, array in load_file(file).items()}
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(array, theirs[name]) for name, array in ours.items())


def test_transformers_loads_model_and_tokenizer_and_reads_as_trained(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    arguments = ["--to", "hf", "--dtype", "bf16", "--tokenizer", str(tokenizer), "--verify"]
    assert main(["convert", str(source), str(out), *arguments]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert str(model.dtype) == "torch.bfloat16"
    text = "def test_transformers(tmp_path: Path) -> None:\n"
    assert AutoTokenizer.from_pretrained(out).encode(text, add_special_tokens=False) == load_tokenizer(
        tokenizer
    ).encode(text)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)


def test_a_checkpoint_again_as_a_checkpoint_has_the_weights_alone(source: Path, tmp_path: Path) -> None:
    assert main(["convert", str(source), str(tmp_path / "a")]) == 0
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "megalite"]) == 0
    a, b = open_weights(tmp_path / "a"), open_weights(tmp_path / "b")
    assert (a.model, a.shapes, a.precision) == (b.model, b.shapes, b.precision)


def test_a_model_with_another_function_is_not_blessed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megalite.convert.huggingface import writer

    right = writer.assemble
    swapped = {"k_proj": "v_proj", "v_proj": "k_proj"}

    def wrong(tensor: Any, weights: Any) -> np.ndarray:
        array = right(tensor, weights)
        return array[::-1].copy() if any(name in tensor.name for name in swapped) else array

    monkeypatch.setattr(writer, "assemble", wrong)
    error = error_of(capsys, source, tmp_path / "out", "--to", "hf", "--verify")
    assert "not written: the logits of 128 tokens differ by at most" in error
    assert "1e-04 is allowed" in error
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_left_alone(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert "exists, and is not overwritten" in error_of(capsys, source, out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("to", ["hf", "megalite"])
def test_a_source_that_breaks_on_the_way_leaves_nothing(
    source: Path, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megalite.convert.huggingface.folder import TensorFiles

    right, count = TensorFiles.read, 0

    def breaking(self: TensorFiles, name: str, box: Any) -> np.ndarray:
        nonlocal count
        count += 1
        if count > 5:
            raise OSError(5, "Input/output error")
        return right(self, name, box)

    monkeypatch.setattr(TensorFiles, "read", breaking)
    assert "cannot be written" in error_of(capsys, source, tmp_path / "out", "--to", to)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_said_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert "needs 164,480 bytes, and 1,000 are free" in error_of(capsys, source, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "bf16"], "--dtype=bf16: a checkpoint holds fp32"),
        (["--max-shard-size", "5 apples"], "--max-shard-size=5 apples: is no size; give one such as 500MB or 5GB"),
        (["--max-shard-size", "0GB"], "is no size"),
        (["--max-positions", "128"], "has max_position_embeddings=64"),
        (["--tokenizer", "missing.model"], "no such tokenizer"),
        (["--to", "gguf"], "gguf"),
    ],
)
def test_options_that_ask_for_what_cannot_be_had(
    source: Path, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, source, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_what_belongs_to_one_kind_of_source(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "held")]) == 0
    held, out = tmp_path / "held", tmp_path / "out"
    assert "belongs to Hugging Face folders" in error_of(capsys, held, out, "--max-positions", "8")
    assert "--verify: compares with transformers" in error_of(capsys, held, out, "--to", "megalite", "--verify")
    assert "nothing: there is no such folder; give" in error_of(capsys, tmp_path / "nothing", out)


def test_a_shorter_longest_sequence(source: Path, tmp_path: Path) -> None:
    assert main(["convert", str(source), str(tmp_path / "out"), "--max-positions", "16", "--to", "hf"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 16


def test_without_transformers_the_extra_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'megalite[hf]'" in error_of(capsys, source, tmp_path / "out", "--verify")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0


def test_a_folder_without_a_tokenizer_says_so(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert "there is no tokenizer with it" in capsys.readouterr().out


def test_missing_tensors_are_a_table(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    held = load_file(broken / "model.safetensors")
    del held["model.norm.weight"]
    save_file(held, broken / "model.safetensors")
    error = error_of(capsys, broken, tmp_path / "out")
    assert ["model.norm.weight", "32", "missing"] in [line.split()[-3:] for line in error.splitlines()]


def test_the_script_from_a_checkout_does_the_same(source: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    done = subprocess.run(
        [sys.executable, script, source, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert "41,120 parameters" in done.stdout
    assert open_weights(tmp_path / "out").model.vocab_size == 400
