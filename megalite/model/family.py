"""A model family: what the run file, the pipeline's stages, conversions and counts need to know of it."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args

from megalite.model.config import ModelConfig
from megalite.model.formats.hugging_face import HuggingFaceFormat
from megalite.model.formats.megatron import MegatronFormat

if TYPE_CHECKING:
    from megalite.model.builder import ModelBuilder
    from megalite.parallel.tensor_group import TensorGroup


@dataclass(frozen=True, slots=True)
class Family:
    """A model family. Names, shapes, counts and initialisation of tensors follow from the modules of its builder."""

    config: type[ModelConfig]
    """The section `model`, whose field ``architecture: Literal["..."]`` is the name of the family."""
    builder: str
    """Where the family's `ModelBuilder` is, as ``my_package.layers:MyBuilder``. The module is imported with the first
    stage that is built, not with the run file, so that it may import torch."""
    other_names: tuple[str, ...] = ()
    """Lower-case names of models and of their classes in transformers that this family computes."""
    hugging_face: tuple[HuggingFaceFormat, ...] = ()
    """The model types of Hugging Face that are read; a model is written as the first that has its flags."""
    megatron: MegatronFormat | None = None
    """The options of Megatron's checkpoints that are read; None: Megatron has no such models."""

    @property
    def name(self) -> str:
        """The value of `model.architecture`; raises ValueError where `config` does not state it."""
        names = get_args(self.config.model_fields["architecture"].annotation)
        if len(names) != 1:
            raise ValueError(f'{self.config.__name__} names no family: write architecture: Literal["NAME"] in it')
        return names[0]

    def build(self, config: ModelConfig, group: "TensorGroup", rows: int | None) -> "ModelBuilder[Any]":
        """Return a builder of the modules of one stage."""
        module, _, name = self.builder.partition(":")
        return getattr(import_module(module), name)(config, group, rows)
