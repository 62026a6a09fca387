"""What is asked of a model, checked as a whole before any rank starts. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from megalite.checkpoint.manifest import PRECISIONS
from megalite.config import tensor_size_fault
from megalite.convert.open import open_weights
from megalite.errors import UserError
from megalite.generation.prompts import Prompt
from megalite.generation.tokenization import Vocabulary, open_vocabulary
from megalite.model.weights import Weights


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from the likely ones.

    Raises UserError for what cannot be.
    """

    temperature: float = 0.8
    """Logits are divided by it before they become probabilities."""
    top_k: int | None = None
    """Only the k likeliest."""
    top_p: float | None = None
    """Only the fewest whose probabilities reach p, of those that `top_k` leaves (arXiv:1904.09751)."""
    seed: int = 1234

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature={self.temperature}: a finite number of 0 or more is allowed; 0 is --greedy")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k={self.top_k}: a whole number of 1 or more is allowed; 1 is --greedy")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p={self.top_p}: a number above 0, at most 1, is allowed; 1 leaves all tokens in")


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a text ends, but for the vocabulary's own ends.

    Raises UserError for what cannot be.
    """

    max_new_tokens: int = 64
    stops: tuple[str, ...] = ()
    """Texts, or names of control tokens, that end it and do not belong to it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens={self.max_new_tokens}: a whole number of 1 or more is allowed")
        if "" in self.stops:
            raise UserError("--stop: is empty, and would end every text at once; give text, or leave it out")


@dataclass(frozen=True)
class Job:
    """Prompts for a model that can take them; made by `prepare`."""

    weights: Weights
    vocabulary: Vocabulary
    prompts: tuple[Prompt, ...]
    prompt_ids: tuple[list[int], ...]
    sampling: Sampling
    limits: Limits
    precision: str
    tensor: int


def prepare(
    path: Path,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    limits: Limits,
    tensor: int = 1,
    precision: str | None = None,
    tokenizer: Path | None = None,
) -> Job:
    """Check that a model can continue prompts; `path` is a checkpoint, a run's folder or a Hugging Face folder.

    `tensor` is the number of ranks that share the model, `precision` that of the weights unless given.

    Raises UserError where there is no model or no tokenizer, the ranks do not divide the model, or a prompt leaves no
    position for a new token.
    """
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"--dtype={precision}: is none that is computed in; use {', '.join(PRECISIONS)}")
    if tensor < 1:
        raise UserError(f"--tensor={tensor}: a whole number of 1 or more is allowed")
    weights = open_weights(path)
    if fault := tensor_size_fault(weights.model, tensor):
        raise UserError(f"--tensor{fault}")
    vocabulary = open_vocabulary(weights, tokenizer)
    encoded = tuple(vocabulary.encode(prompt.text, prompt.where) for prompt in prompts)
    positions = weights.model.max_position_embeddings
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) >= positions:
            raise UserError(
                f"{prompt.where}: has {len(ids):,} tokens, and the model has max_position_embeddings={positions}; "
                f"use at most {positions - 1:,} tokens"
            )
    return Job(weights, vocabulary, tuple(prompts), encoded, sampling, limits, precision or weights.precision, tensor)
