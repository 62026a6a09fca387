"""One microbatch on the device of a rank: tokens, targets, loss weights, packing and dropout."""

from dataclasses import dataclass

from torch import Tensor

from megalite.model.dropout import DropoutStreams
from megalite.model.packing import PackedDocuments


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Token ids ``[B, S]``, int64, on the first stage and targets ``[B, S]`` on the last; None on other stages.

    With `loss_weights` ``[B, S]``, fp32, the loss of a step is the weighted sum over its tokens; without them it is the
    mean. `packing` has the boundaries of documents, and `dropout` the dropout masks; every stage needs both.
    """

    ids: Tensor | None
    targets: Tensor | None
    packing: PackedDocuments | None = None
    loss_weights: Tensor | None = None
    dropout: DropoutStreams | None = None
