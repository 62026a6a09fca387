"""``megalite inspect`` of a Hugging Face folder: its model, files, tokenizer, what ends a text, its tensors."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megalite.cli import main

CONFIG = {
    "model_type": "llama",
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
LAYER = {
    **{"input_layernorm": (8,), "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8)},
    **{"self_attn.o_proj": (8, 8), "post_attention_layernorm": (8,), "mlp.gate_proj": (16, 8), "mlp.up_proj": (16, 8)},
    "mlp.down_proj": (8, 16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shapes = {"model.embed_tokens.weight": (12, 8), "model.norm.weight": (8,)}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()}
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def add_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    made.add_special_tokens(["</s>", "<|im_end|>", "<s>"])
    made.save(str(folder / "tokenizer.json"))


def test_a_folder_is_described(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>", "chat_template": "x"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 2]}')
    (folder / "adapter_model.safetensors").write_text("")
    assert main(["inspect", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: a llama of Hugging Face's, 696 parameters, 11 tensors, 0.0 MB"
    assert lines[1] == "precision: fp32"
    assert lines[2].startswith("model: architecture llama, vocab_size 12, hidden_size 8, num_hidden_layers 1, ")
    assert [line.split()[-2] for line in lines[3:7]] == [
        *("generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    assert lines[7] == "not read: adapter_model.safetensors, which may hold weights too"
    assert lines[8].startswith("tokenizer: tokenizer.json, 5 ids, SHA-256 ")
    assert lines[9:13] == [
        "chat template: tokenizer_config.json",
        "begins a text: 4 <s>",
        "ends a text: 2 </s>, 3 <|im_end|>, by generation_config.json",
        "",
    ]
    tensors = dict(line.split("  ", 1) for line in lines[13:])
    assert len(tensors) == 11
    assert tensors["model.layers.0.self_attn.k_proj.weight"].split() == ["4", "x", "8", "F32"]


@pytest.mark.parametrize("tokenizer", [False, True])
def test_what_ends_a_text_is_told_without_settings_of_generation(
    folder: Path, tokenizer: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if tokenizer:
        add_tokenizer(folder)
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert ("ends a text: 2 </s>, by config.json" if tokenizer else "ends a text: 2 of config.json") in out
    assert ("begins a text: nothing" if tokenizer else "tokenizer: none") in out


def test_what_no_hugging_face_folder_knows_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--verify"], ["--step", "3"], ["--documents", "3"]):
        assert main(["inspect", str(folder), *option]) == 2
        assert f"{option[0]}: {folder} is a Hugging Face folder" in capsys.readouterr().err


def test_a_broken_folder_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 16}))
    assert main(["inspect", str(folder)]) == 2
    assert "its tensors are not those of the llama in its config.json" in capsys.readouterr().err
