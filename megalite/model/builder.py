"""The builder of a stage's modules: what a model family puts into the embedding, the layers and before the head."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import nn

from megalite.model.config import ModelConfig
from megalite.model.embedding import Embedding
from megalite.parallel.tensor_group import TensorGroup

Config = TypeVar("Config", bound=ModelConfig)


class ModelBuilder(ABC, Generic[Config]):
    """Builds the modules of one stage; a family derives from it.

    Every parameter has a global name, its name in the stage, and layers of `tensor_parallel.layers` declare how the
    tensor ranks divide it. Parameters of other modules are replicated on every rank of `group`.

    Attributes:
        config: the configuration of the model, with its vocabulary size.
        group: the tensor-parallel group of the stage.
        rows: B, the rows of a microbatch, with sequence parallelism; None without it.
    """

    def __init__(self, config: Config, group: TensorGroup, rows: int | None) -> None:
        self.config, self.group, self.rows = config, group, rows

    def embedding(self) -> Embedding:
        """Return the embedding of the first stage: a table of tokens, unless the family has more."""
        return Embedding(self.config, self.group)

    @abstractmethod
    def norm(self) -> nn.Module:
        """Return a norm over the hidden dim; also the one before the head."""

    @abstractmethod
    def block(self, layer: int) -> nn.Module:
        """Return layer `layer` of the model.

        It is called as ``block(x, packing=..., dropout=...)`` in training and as ``block(x, cache=...)`` in generation,
        takes the residual stream ``[B, S, H]``, with sequence parallelism ``[1, B*S / size, H]``, and returns the same.
        With gradients enabled it may return losses of its own beside it: ``return x, {"router_balance": loss}``.
        """
