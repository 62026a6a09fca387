"""One microbatch on the device of a rank: the named tensors that the model's stages and the loss agree on."""

from dataclasses import dataclass

from torch import Tensor

from megalite.model.dropout import DropoutStreams
from megalite.model.packing import PackedDocuments


@dataclass(frozen=True, slots=True)
class Microbatch:
    """The data of one forward, which every stage takes whole; engine and executor do not look into it.

    `ids` ``[B, S]``, int64, are there for the first stage, `targets` ``[B, S]`` and `loss_weights` for the last; they
    are None on ranks without it. `packing` has the boundaries of documents, and `dropout` the dropout masks; every
    stage needs both. A model or a loss that needs other data reads it from fields of a subclass.

    With `loss_weights` ``[B, S]``, fp32, the loss of a step is the weighted sum over its tokens; without them it is the
    mean, over the tokens and over the `num_microbatches` of this rank's step.
    """

    ids: Tensor | None = None
    targets: Tensor | None = None
    packing: PackedDocuments | None = None
    loss_weights: Tensor | None = None
    dropout: DropoutStreams | None = None
    num_microbatches: int = 1

    def average(self, losses_BS: Tensor) -> Tensor:
        """Return this microbatch's summand of the step's loss, a scalar, from the losses of its tokens ``[B, S]``."""
        if self.loss_weights is None:
            return losses_BS.mean() / self.num_microbatches
        return (losses_BS * self.loss_weights).sum()
