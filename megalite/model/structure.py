"""Names and shapes of a model's weights, and its FLOPs, from its modules on the meta device."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from megalite.model.config import ModelConfig

if TYPE_CHECKING:
    from megalite.model.stage import Stage


@runtime_checkable
class CountsFlops(Protocol):
    """A module of which FLOPs are counted."""

    def flops_per_token(self, sequence_length: int) -> float:
        """Return the FLOPs of one token's forward and backward, those of the modules in it left out."""
        ...


def meta_stage(
    config: ModelConfig,
    layers: Sequence[int],
    index: int = 0,
    num_stages: int = 1,
    *,
    tensor: tuple[int, int] = (0, 1),
    shares_rank: bool = False,
) -> "Stage":
    """Return a stage on the meta device, whose parameters have shapes and no memory.

    `tensor` is the rank on the tensor axis and the axis' size. With `shares_rank` the stage is without a tied table
    that it shares with the first stage of its rank.
    """
    import torch

    from megalite.model.stage import Stage
    from megalite.parallel.tensor_group import TensorGroup

    with torch.device("meta"):
        group = TensorGroup(*tensor)
        first = Stage(config, (), index=0, num_stages=num_stages, group=group) if shares_rank else None
        table = None if first is None else first.tied_table
        return Stage(config, layers, index=index, num_stages=num_stages, group=group, table=table)


@lru_cache(maxsize=16)
def weight_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the global shape of each weight by its global name, embedding first and head last."""
    return MappingProxyType(dict(_weights(config)))


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Return the FLOPs of one token's forward and backward, summed over the modules of the model that count them."""
    sample, layers = _sample(config)
    total = 0.0
    for name, module in sample.named_modules():
        if isinstance(module, CountsFlops):
            copies = layers.count(int(name.split(".")[1])) if name.startswith("layers.") else 1
            total += copies * module.flops_per_token(sequence_length)
    return total


def _weights(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    sample, layers = _sample(config)
    of_layer: dict[int, dict[str, tuple[int, ...]]] = {layer: {} for layer in layers}
    others: dict[str, tuple[int, ...]] = {}
    for name, shape in _module_by_module(sample):
        match name.split(".", 2):
            case ["layers", number, rest]:
                of_layer[int(number)][rest] = shape
            case _:
                others[name] = shape
    embedding = {name: shape for name, shape in others.items() if name.startswith("embedding.")}
    yield from embedding.items()
    for layer, alike in enumerate(layers):
        yield from ((f"layers.{layer}.{rest}", shape) for rest, shape in of_layer[alike].items())
    yield from ((name, shape) for name, shape in others.items() if name not in embedding)


def _module_by_module(sample: "Stage") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield a weight and its bias together, where training has the weights of several modules in one parameter."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for placed in sample.placed_parameters:
        for spec in (shard.spec for shard in placed.shards):
            modules.setdefault(spec.name.rpartition(".")[0], {})[spec.name] = spec.global_shape
    for module in modules.values():
        yield from module.items()


def _sample(config: ModelConfig) -> "tuple[Stage, tuple[int, ...]]":
    """Return the whole model with one layer of each kind, and for each layer the number of the one that is like it."""
    first_of_kind: dict[object, int] = {}
    layers = tuple(
        first_of_kind.setdefault(config.layer_kind(layer), layer) for layer in range(config.num_hidden_layers)
    )
    return meta_stage(config, [*first_of_kind.values()]), layers
