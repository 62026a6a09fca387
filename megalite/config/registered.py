"""Kinds of values that name what a plugin has registered: a loss, a dataset, callbacks."""

from collections.abc import Iterable
from typing import Any

from megalite.errors import nearest
from megalite.registry import CALLBACKS, DATASETS, LOSSES, Registry
from megalite.settings.values import Kind, Unfit, require


def _read(name: Any, registry: Registry[Any], otherwise: str = "") -> str:
    require(isinstance(name, str))
    if name not in registry:
        near = nearest(name, registry)
        raise Unfit(f" is no registered {registry.kind}{near}; name its module in plugins{otherwise}")
    return name


def _read_all(names: Any, registry: Registry[Any]) -> list[str]:
    require(isinstance(names, Iterable) and not isinstance(names, str))
    return [_read(name, registry) for name in names]


LOSS = Kind("the name of a registered loss", lambda name: _read(name, LOSSES))
DATASET = Kind(
    "the name of a registered dataset",
    lambda name: _read(name, DATASETS, ", or write prefix for a tokenised corpus"),
)
CALLBACK_NAMES = Kind("a list of names of registered callbacks", lambda names: _read_all(names, CALLBACKS))
