"""One microbatch on the device of a rank: what a stage of the model reads beside its inputs."""

from dataclasses import dataclass

from torch import Tensor

from megalite.model.dropout import DropoutStreams
from megalite.model.packing import PackedDocuments


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Token ids and targets ``[B, S]``, int64; each is needed at one end of the pipeline only, and None elsewhere.

    With `loss_weights` ``[B, S]``, fp32, the losses of a step are the sum over its tokens, each times its weight;
    without, the mean. `packing` says on every stage where documents begin, and `dropout` what is dropped.
    """

    ids: Tensor | None
    targets: Tensor | None
    packing: PackedDocuments | None = None
    loss_weights: Tensor | None = None
    dropout: DropoutStreams | None = None
