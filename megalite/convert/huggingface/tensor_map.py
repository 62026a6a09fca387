"""How a tensor of theirs is made of weights of ours: at most stacked by blocks of rows, and then transposed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megalite.model.config import ModelConfig
from megalite.model.formats.hugging_face import HuggingFaceFormat, Module
from megalite.model.structure import weight_shapes
from megalite.parallel.regions import Region


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of theirs: weights `ours`, each of `part_shape`, stacked in turns of `block` rows.

    Row r of weight p stands in row ``(r // block * len(ours) + p) * block + r % block``.
    """

    name: str
    ours: tuple[str, ...]
    part_shape: tuple[int, ...]
    block: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it is stored in."""
        rows, *rest = self.part_shape
        return self._stored((rows * len(self.ours), *rest))

    def pieces(self, part: int, region: Region) -> Iterator[tuple[Region, Region]]:
        """Cut a box of weight `part` into pieces; yield where each is stored, and where it is within `region`.

        What is stored `transposed` has to be turned.
        """
        (start, *corner), (rows, *extent) = region.offset, region.shape
        stop = start + rows
        while start < stop:
            turn, within = divmod(start, self.block)
            end = min(stop, (turn + 1) * self.block)
            row = (turn * len(self.ours) + part) * self.block + within
            stored = Region(self._stored((row, *corner)), self._stored((end - start, *extent)))
            yield stored, Region((start - region.offset[0], *[0] * len(corner)), (end - start, *extent))
            start = end

    def _stored(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return numbers[::-1] if self.transposed else numbers


def tensors_of(form: HuggingFaceFormat, model: ModelConfig) -> Iterator[Tensor]:
    """Return all tensors of a model of ours as they are stored, in the order of the layers."""
    named = [
        *(replace(module, theirs=form.prefix + module.theirs) for module in form.embedding),
        *(_in_layer(form, module, layer) for layer in range(model.num_hidden_layers) for module in form.layers),
        replace(form.norm, theirs=form.prefix + form.norm.theirs),
        Module(form.head, ("head",)),
    ]
    shapes = weight_shapes(model)
    for module in named:
        yield from _tensors_of_module(module, shapes, model.head_dim)


def _in_layer(form: HuggingFaceFormat, module: Module, layer: int) -> Module:
    theirs = f"{form.prefix}{form.layer.format(layer)}.{module.theirs}"
    return replace(module, theirs=theirs, ours=tuple(f"layers.{layer}.{name}" for name in module.ours))


def _tensors_of_module(module: Module, shapes: Mapping[str, tuple[int, ...]], head_dim: int) -> Iterator[Tensor]:
    """Return a module's tensors in a model of these shapes; parameters that the model lacks are left out."""
    for kind in ("weight", "bias"):
        ours = tuple(f"{name}.{kind}" for name in module.ours)
        if all(name in shapes for name in ours):
            shape = shapes[ours[0]]
            block = head_dim if module.by_head else shape[0]
            yield Tensor(f"{module.theirs}.{kind}", ours, shape, block, module.transposed)
