"""Losses of the last stage: from the logits and the microbatch to named scalars."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from megalite.model.microbatch import Microbatch
from megalite.registry import LOSSES
from megalite.tensor_parallel.cross_entropy import VocabParallelLogits

LOSS = "loss"
"""The name of the language model's loss, which a run reports, averages in evaluations and watches for spikes."""


class LossFunction(Protocol):
    """Computes the losses of the last stage; each is a summand of the step's loss, as `Microbatch.average` makes it.

    The result has `LOSS`, and may have further losses, which are added to the objective and reported by their names.
    """

    def __call__(self, logits: VocabParallelLogits, microbatch: Microbatch) -> dict[str, Tensor]: ...


Loss = TypeVar("Loss", bound=LossFunction)


def register_loss(name: str) -> Callable[[Loss], Loss]:
    """Register a `LossFunction` under the name that ``train.loss`` gives."""
    return LOSSES.register(name)


def loss_function(name: str | None) -> LossFunction:
    """Return the registered loss of a name; with None the cross-entropy."""
    return cross_entropy if name is None else LOSSES[name]


def cross_entropy(logits: VocabParallelLogits, microbatch: Microbatch) -> dict[str, Tensor]:
    """Return the cross-entropy of the targets, fp32, in nats."""
    assert microbatch.targets is not None
    return {LOSS: microbatch.average(logits.cross_entropy(microbatch.targets))}
