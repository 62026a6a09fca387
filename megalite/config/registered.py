"""Kinds of values that name what a plugin has registered: a loss, a dataset, callbacks."""

from typing import Any

from megalite.errors import nearest
from megalite.registry import CALLBACKS, DATASETS, LOSSES, Registry
from megalite.settings.values import Kind, Unfit, require


def _read(name: Any, registry: Registry[Any], otherwise: str = "") -> str:
    require(isinstance(name, str))
    if name not in registry:
        raise Unfit(f" is {_unknown(name, registry)}{otherwise}")
    return name


def _read_all(names: Any, registry: Registry[Any]) -> list[str]:
    require(isinstance(names, list | tuple) and all(isinstance(name, str) for name in names))
    for name in names:
        if name not in registry:
            raise Unfit(f" has {name!r}, which is {_unknown(name, registry)}")
    return list(names)


def _unknown(name: str, registry: Registry[Any]) -> str:
    return f"no registered {registry.kind}{nearest(name, registry)}; name its module in plugins"


LOSS = Kind("the name of a registered loss", lambda name: _read(name, LOSSES))
DATASET = Kind(
    "the name of a registered dataset",
    lambda name: _read(name, DATASETS, ", or write prefix for a tokenised corpus"),
)
CALLBACK_NAMES = Kind("a list of names of registered callbacks", lambda names: _read_all(names, CALLBACKS))
