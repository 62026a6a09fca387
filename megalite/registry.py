"""Registry: the values of one kind that a run file can name, those that plugins register among them."""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Maps the names of a run file to values of one kind, such as losses.

    >>> LOSSES: Registry[object] = Registry("loss")
    >>> @LOSSES.register("focal")
    ... def focal(): ...
    >>> list(LOSSES)
    ['focal']
    """

    def __init__(self, kind: str) -> None:
        """`kind` is what messages call a value."""
        self.kind = kind
        self._values: dict[str, T] = {}
        self._sources: dict[str, tuple[str, str]] = {}

    def register(self, name: str, defined_by: object = None) -> Callable[[T], T]:
        """Return a decorator that registers a function or a class under `name`, and returns it unchanged.

        A value that is neither is `defined_by` a class or function of its module. Raises ValueError where another value
        has the name.
        """

        def add(value: T) -> T:
            # A script that names itself as a plugin runs twice, as __main__ and under its name.
            source = _source(value if defined_by is None else defined_by)
            if self._sources.setdefault(name, source) != source:
                raise ValueError(f"the {self.kind} {name!r} is registered already, by {self._sources[name][0]}")
            self._values[name] = value
            return value

        return add

    def __getitem__(self, name: str) -> T:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


LOSSES: Registry[Any] = Registry("loss")
"""Losses of the last stage; `megalite.model.loss.register_loss` says what they are."""
DATASETS: Registry[Any] = Registry("dataset")
"""Datasets to train and evaluate on; `megalite.data.registered.register_dataset` says what they are."""
CALLBACKS: Registry[Any] = Registry("callback")
"""Observers of a run; `megalite.monitoring.callback.register_callback` says what they are."""


def _source(value: object) -> tuple[str, str]:
    """Return the file that a value is defined in, or its module where it has no file, and its name there."""
    module = getattr(value, "__module__", type(value).__module__)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return getattr(sys.modules.get(module), "__file__", None) or module, name
