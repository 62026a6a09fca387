"""Proof of a conversion: both models read the same tokens in fp32, and their logits are held against each other."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.model.load import load_stage
from megalite.model.stage import Stage
from megalite.model.weights import Weights
from megalite.parallel.tensor_group import TensorGroup

TOLERANCE = 1e-4
"""The largest absolute difference of two logits that is taken for rounding."""
_SHAPE = (2, 128)


def require_transformers() -> Any:
    """Return the package, quiet; raise UserError where it is not there."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "--verify: runs the model in transformers too, which is not here; install it with "
            "`pip install 'megalite[hf]'`"
        ) from error
    return transformers


def largest_difference(
    weights: Weights, hugging_face: Path, progress: Callable[[int, int], None] | None = None
) -> tuple[float, int]:
    """Return the largest absolute difference of the two models' logits, and how many tokens they read.

    `weights` run here, the folder `hugging_face` in transformers, without code of its own. Both are in memory, in
    fp32. Raises UserError where a logit of either is not finite: numbers that are none prove nothing.
    """
    transformers = require_transformers()
    ids = _tokens(weights.model)
    ours = _our_logits(weights, ids, progress)
    theirs = _their_logits(transformers, hugging_face, ids)
    if ours.shape != theirs.shape:
        return math.inf, ids.numel()
    for logits, where in ((ours, weights.origin), (theirs, hugging_face)):
        if strange := logits.numel() - int(logits.isfinite().sum()):
            raise UserError(
                f"{where}: {strange:,} of {logits.numel():,} logits are infinite or no numbers, which proves nothing "
                "of a conversion; convert without --verify to look at the weights"
            )
    return float((ours - theirs).abs().max()), ids.numel()


def _tokens(model: ModelConfig) -> Tensor:
    assert model.vocab_size is not None
    rows, length = _SHAPE[0], min(_SHAPE[1], model.max_position_embeddings)
    return torch.randint(model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _our_logits(weights: Weights, ids_BS: Tensor, progress: Callable[[int, int], None] | None) -> Tensor:
    model = weights.model
    stage = Stage(model, range(model.num_hidden_layers), index=0, num_stages=1, group=TensorGroup())
    load_stage(stage, weights, progress)
    assert stage.embedding is not None
    x_BSH = stage.embedding(ids_BS)
    for block in stage.layers.values():
        x_BSH = block(x_BSH)
    return stage.logits(x_BSH).gather()


@torch.no_grad()
def _their_logits(transformers: Any, folder: Path, ids_BS: Tensor) -> Tensor:
    log = transformers.utils.logging
    # Files of torch's are read there as they are here, as plain tensors alone.
    safe = any(path.suffix == ".safetensors" for path in folder.iterdir())
    level, had_bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=safe, local_files_only=True
        )
        return model.eval()(ids_BS, use_cache=False).logits
    except Exception as error:  # whatever it has against the folder
        raise UserError(f"{folder}: transformers does not run it: {type(error).__name__}: {error}") from error
    finally:
        log.set_verbosity(level)
        if had_bar:
            log.enable_progress_bar()
