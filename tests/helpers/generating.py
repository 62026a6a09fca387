"""Small models with a tokenizer, saved as checkpoints of weights alone, for tests that generate."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalite.checkpoint import store
from megalite.checkpoint.manifest import Manifest
from megalite.checkpoint.store import Part
from megalite.checkpoint.weights import WEIGHT
from megalite.config import ModelConfig, read_model
from megalite.data.tokenizers.train_sentencepiece import train_sentencepiece
from megalite.generation.generator import load_generator
from megalite.generation.prompts import Prompt
from megalite.generation.request import Limits, Sampling, prepare
from megalite.generation.sequence import Continuation
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup

SHAPE: dict[str, Any] = {
    "vocab_size": 333,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    # Wide enough that a random model does not repeat one token.
    "initializer_range": 0.3,
}
LLAMA = {"architecture": "llama", **SHAPE, "num_key_value_heads": 2}
TEXTS = ["the quick brown fox", "a", "", "the lazy dog runs away from the other foxes"]
GREEDY = Sampling(temperature=0)
CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "one key-value head": {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "norms on queries and keys": {**LLAMA, "qk_norm": True, "attention_bias": True},
    "gpt2": {"architecture": "gpt2", **SHAPE},
    "gpt_neox": {"architecture": "gpt_neox", **SHAPE},
}


def whole_stage(model: ModelConfig) -> Stage:
    """The whole model with random weights, norms and biases included."""
    stage = Stage(model, range(model.num_hidden_layers), index=0, num_stages=1, group=TensorGroup())
    stage.initialise(seed=3)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return stage


def all_logits(stage: Stage, ids: list[int]) -> Tensor:
    """The logits ``[S, V]`` after every token, by a forward over all of them at once."""
    assert stage.embedding is not None
    x = stage.embedding(torch.tensor([ids]))
    for block in stage.layers.values():
        x = block(x)
    return stage.logits(x).gather()[0]


def greedy_tokens(stage: Stage, ids: list[int], count: int) -> list[int]:
    """What follows a prompt, each token by a forward over all before it."""
    made: list[int] = []
    for _ in range(count):
        made.append(int(all_logits(stage, ids + made)[-1].argmax()))
    return made


def save_model(folder: Path, fields: dict[str, Any], tokenizer: bytes | None = None, precision: str = "fp32") -> Stage:
    """Save a model with random weights as the checkpoint `folder`; return it."""
    stage = whole_stage(read_model(fields))
    parts = []
    for placed in stage.placed_parameters:
        for shard in placed.shards:
            array = placed.parameter.detach()[shard.target.slices].numpy()
            load = partial(np.ascontiguousarray, array)
            parts.append(Part(WEIGHT + shard.spec.name, shard.spec.global_shape, shard.source, load))
    store.begin(folder)
    store.write_rank(folder, 0, parts)
    files = {} if tokenizer is None else {"tokenizer.model": tokenizer}
    manifest = Manifest(0, {}, {}, model=fields, precision=precision)
    store.finish(folder, ranks=1, manifest=manifest, state={"step": 0}, files=files)
    return stage


def train_tokenizer(folder: Path) -> bytes:
    """Return a sentencepiece model of 310 ids, the bytes and the control token ``<|im_end|>``, 3, among them."""
    text, model = folder / "text.txt", folder / "tok.model"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away from the other foxes\n" * 20)
    train_sentencepiece([text], vocab_size=310, output=model, control_tokens=["<|im_end|>"])
    return model.read_bytes()


def continued(
    path: Path, texts: list[str], sampling: Sampling, limits: Limits, group: TensorGroup | None = None
) -> list[Continuation]:
    """What a model makes of texts, each as the rows heard it."""
    group = group or TensorGroup()
    prompts = [Prompt(text, text) for text in texts]
    job = prepare(path, prompts, sampling=sampling, limits=limits, tensor=group.size)
    rows = [Continuation(job, number) for number in range(len(texts))]
    heard = [""] * len(texts)

    def hear(row: Continuation, piece: str) -> None:
        heard[row.number] += piece

    load_generator(job, group, CPU).run(rows, hear)
    assert heard == [row.text for row in rows]
    assert all(row.reason for row in rows)
    return rows
