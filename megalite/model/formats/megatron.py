"""The options of a Megatron run, and how a family recognises itself in them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class MegatronOptions:
    """Options by name: those that an old release did not have yet have their default."""

    def __init__(self, args: Mapping[str, object]) -> None:
        self._args = args

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first of the options that is told and set."""
        return next((self._args[name] for name in names if self._args.get(name) is not None), default)

    def need(self, *names: str) -> Any:
        """Return the first of the options that is told; raise LookupError with its name where none is."""
        found = self.get(*names)
        if found is None:
            raise LookupError(names[0])
        return found

    @property
    def norm_epsilon(self) -> float:
        return self.get("norm_epsilon", "layernorm_epsilon", default=1e-5)

    @property
    def rope_theta(self) -> float:
        return float(self.get("rotary_base", default=10000))

    @property
    def rotary_percent(self) -> float:
        return float(self.get("rotary_percent", default=1.0))

    @property
    def has_tanh_gelu(self) -> bool:
        """Megatron's GELU fused with the bias is the tanh form, and so is --openai-gelu; the plain one is exact."""
        return bool(self.get("openai_gelu") or self.get("bias_gelu_fusion", default=True))


@dataclass(frozen=True, slots=True)
class MegatronFormat:
    """The models of a family in Megatron's options."""

    kind: Mapping[str, object]
    """The options by which the family is recognised: `normalization`, `position_embedding_type`, `swiglu` and
    `add_bias_linear`."""
    section: Callable[[MegatronOptions], Mapping[str, object]]
    """Returns the keys of the section `model` beside the sizes that every model has. Raises ValueError, with the names
    of options, for a model of this kind that the family does not compute."""


def kind(normalization: str, positions: str, *, swiglu: bool, bias: bool) -> dict[str, object]:
    """Return a `MegatronFormat.kind`."""
    names = ("normalization", "position_embedding_type", "swiglu", "add_bias_linear")
    return dict(zip(names, (normalization, positions, swiglu, bias), strict=True))
