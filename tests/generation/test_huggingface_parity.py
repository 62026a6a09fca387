"""Greedy text is that of Hugging Face's own ``generate`` from the same folder, token for token."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import GREEDY, TEXTS, continued
from harness import run_distributed

from megalite.generation.request import Limits
from megalite.parallel.tensor_group import TensorGroup

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "llama 3": ("Llama", {**GROUPED, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2", {**SIZES, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", GROUPED),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", SIZES),
}


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE of 300 ids that puts a token before every text, as Llama 3's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([f"{text} " * 9 for text in TEXTS], trainer)
    made.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])  # pyright: ignore
    return made.to_str()


def hugging_face_folder(folder: Path, family: str, tokenizer_json: str) -> Any:
    name, fields = FAMILIES[family]
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model


def their_tokens(model: Any, folder: Path, text: str, count: int) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    seen = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return made[0, ids.shape[1] :].tolist()


def our_tokens(path: str) -> list[list[int]]:
    dist = torch.distributed
    group = TensorGroup()
    if dist.is_initialized():
        group = TensorGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    return [row.tokens for row in continued(Path(path), TEXTS, GREEDY, Limits(24), group)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_theirs(family: str, tmp_path: Path, tokenizer_json: str) -> None:
    model = hugging_face_folder(tmp_path, family, tokenizer_json)
    theirs = [their_tokens(model, tmp_path, text, 24) for text in TEXTS]
    assert len({tuple(tokens) for tokens in theirs}) == len(TEXTS)  # the prompts matter
    assert our_tokens(str(tmp_path)) == theirs
    if family in ("llama 3", "gpt_neox"):
        assert run_distributed(our_tokens, 2, str(tmp_path)) == [theirs, theirs]
