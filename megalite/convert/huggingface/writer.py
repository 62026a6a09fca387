"""A Hugging Face folder from weights under our names, tensor by tensor."""

import json
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from megalite.checkpoint.model_files import GENERATION_CONFIG
from megalite.checkpoint.safetensors_file import ENCODINGS, write_safetensors
from megalite.convert.huggingface.config import CONFIG, config_of
from megalite.convert.huggingface.folder import INDEX, SINGLE
from megalite.convert.huggingface.tensor_map import Tensor, tensors_of
from megalite.convert.huggingface.tokenizer_files import TokenizerFiles
from megalite.errors import UserError
from megalite.files import write_atomically
from megalite.model.weights import Weights
from megalite.parallel.regions import Region

_METADATA = {"format": "pt"}
"""Without it transformers does not know which way round the elements are meant."""


def write_folder(
    weights: Weights,
    folder: Path,
    *,
    precision: str,
    tokenizer: TokenizerFiles,
    max_shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write a model into an empty folder, in files of at most `max_shard_bytes`, or of one tensor that is larger.

    One tensor is in memory at a time. `progress` is told the bytes done and in all. Raises UserError for a model that
    no family's class computes, and for elements that `precision` cannot hold.
    """
    form, config = config_of(weights.model, precision, tokenizer.token_ids)
    tensors = list(tensors_of(form, weights.model))
    shards = _shards(tensors, ENCODINGS[precision].itemsize, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    done, total = 0, sum(map(_elements, tensors)) * ENCODINGS[precision].itemsize

    def arrays(shard: Sequence[Tensor]) -> Iterator[np.ndarray]:
        nonlocal done
        for tensor in shard:
            yield _require_finite(tensor, assemble(tensor, weights), precision)
            done += _elements(tensor) * ENCODINGS[precision].itemsize
            progress(done, total)

    for name, shard in zip(names if len(shards) > 1 else [SINGLE], shards, strict=True):
        shapes = {tensor.name: tensor.shape for tensor in shard}
        write_safetensors(folder / name, shapes, arrays(shard), precision=precision, metadata=_METADATA)
    if len(shards) > 1:
        weight_map = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
        metadata = {"total_parameters": sum(map(_elements, tensors)), "total_size": total}
        write_atomically(folder / INDEX, _json({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}))
    write_atomically(folder / CONFIG, _json(config))
    files = {GENERATION_CONFIG: _json(tokenizer.token_ids), **tokenizer.files}
    for name, content in files.items():
        write_atomically(folder / name, content)


def assemble(tensor: Tensor, weights: Weights) -> np.ndarray:
    """Return a tensor of theirs, made of the weights that it consists of."""
    whole = Region.whole(tensor.part_shape)
    stored = np.empty(tensor.shape, np.float32)
    for part, name in enumerate(tensor.ours):
        for place, within in tensor.pieces(part, whole):
            view = stored[place.slices]
            weights.read(name, within, view.T if tensor.transposed else view)
    return stored


def _shards(tensors: Sequence[Tensor], itemsize: int, limit: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    room = limit
    for tensor in tensors:
        size = _elements(tensor) * itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= size
    return shards


def _elements(tensor: Tensor) -> int:
    return prod(tensor.shape)


def _require_finite(tensor: Tensor, array: np.ndarray, precision: str) -> np.ndarray:
    limit = float(np.finfo(np.float16).max)
    if precision == "fp16" and max(float(array.max()), -float(array.min())) > limit:
        raise UserError(f"--dtype=fp16: {tensor.name} has elements beyond {limit:,.0f}; use bf16 or fp32")
    return array


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
