"""Parameter groups by name pattern: which parameters are trained, at which rate, with which decay."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

from megalite.errors import did_you_mean

if TYPE_CHECKING:
    from torch import nn


class Rule(Protocol):
    """A parameter group of the run file."""

    @property
    def match(self) -> str: ...
    @property
    def lr_scale(self) -> float | None: ...
    @property
    def weight_decay(self) -> float | None: ...
    @property
    def frozen(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ParameterSettings:
    """How one parameter is trained, if it is not frozen."""

    decays: bool
    """Whether the parameter is a matrix; norms and biases never decay."""
    weight_decay: float
    lr_scale: float = 1.0
    frozen: bool = False


def parameter_settings(
    shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule], weight_decay: float
) -> dict[str, ParameterSettings]:
    """Return the settings of every parameter, by global name: those of the first rule that matches its name.

    `weight_decay` is the decay of matrices without a rule that states another. `rule_faults` checks the rules.
    """
    settings = {}
    for name, shape in shapes.items():
        rule = next((rule for rule in rules if fnmatchcase(name, rule.match)), None)
        own_decay, own_scale = (None, None) if rule is None else (rule.weight_decay, rule.lr_scale)
        is_matrix = len(shape) > 1
        settings[name] = ParameterSettings(
            decays=is_matrix,
            weight_decay=0.0 if not is_matrix else weight_decay if own_decay is None else own_decay,
            lr_scale=1.0 if own_scale is None else own_scale,
            frozen=rule is not None and rule.frozen,
        )
    return settings


def rule_faults(shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule]) -> Iterator[tuple[int, str]]:
    """Find rules without effect: yield the number of the rule, from 0, and the words that follow its `match`."""
    left = dict(shapes)
    for number, rule in enumerate(rules):
        matched = [name for name in shapes if fnmatchcase(name, rule.match)]
        mine = [name for name in matched if name in left]
        if not matched:
            near = did_you_mean(rule.match, _patterns(shapes))
            yield number, f" matches no parameter of the model{near or f'; its names are such as {_examples(shapes)}'}"
        elif not mine:
            yield number, " matches only parameters of earlier groups, which come first; move it up, or leave it out"
        elif rule.weight_decay and all(len(shapes[name]) < 2 for name in mine):
            yield number, " matches only norms and biases, which never decay; leave its weight_decay out"
        for name in mine:
            del left[name]
    if rules and all(found.frozen for found in parameter_settings(shapes, rules, 0.0).values()):
        yield len(rules) - 1, " leaves no parameter to train; match fewer parameters with frozen: true"


def _patterns(names: Iterable[str]) -> set[str]:
    """Return the names, and the pattern of everything below each of their prefixes."""
    prefixes = (prefix for name in names for prefix in accumulate(name.split("."), "{}.{}".format))
    return {pattern for prefix in prefixes for pattern in (prefix, f"{prefix}.*")}


def _examples(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:3])


def unequal_parts(parts: Iterable[Sequence[str]], settings: Mapping[str, ParameterSettings]) -> tuple[str, str] | None:
    """Return two parameters of one training tensor with different settings, if any; `parts` are such tensors' names."""
    for names in parts:
        for name in names[1:]:
            if settings[name] != settings[names[0]]:
                return names[0], name
    return None


def optimizer_groups(
    parameters: Iterable[tuple[str, "nn.Parameter"]],
    settings: Mapping[str, ParameterSettings],
    *,
    separate: str | None,
    placeholder: "Callable[[], nn.Parameter]",
) -> list[dict[str, Any]]:
    """Return this rank's parameter groups for a torch optimizer; each has a ``weight_decay`` and an ``lr_scale``.

    The groups follow from the settings of the whole model, so that every rank has the same groups in the same order.
    No group is empty: where this rank has no parameter of a group, `placeholder` makes one. The parameter named
    `separate` is a group of its own, the last one.
    """

    def group_of(name: str) -> tuple[Any, ...]:
        found = settings[name]
        return found.decays, found.weight_decay, found.lr_scale, name == separate

    keys = dict.fromkeys(group_of(name) for name, found in settings.items() if not found.frozen)
    members: dict[tuple[Any, ...], list[Any]] = {key: [] for key in sorted(keys, key=lambda key: key[-1])}
    for name, parameter in parameters:
        if not settings[name].frozen:
            members[group_of(name)].append(parameter)
    return [
        {"params": found or [placeholder()], "weight_decay": decay, "lr_scale": scale}
        for (_, decay, scale, _), found in members.items()
    ]
