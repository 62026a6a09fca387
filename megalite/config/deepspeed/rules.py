"""What may become of a key of the DeepSpeed JSON: honoured, derived, left out with a note, or refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megalite.settings.values import Kind

Precision = Literal["fp32", "bf16", "fp16"]
PRECISION_NAMES: Mapping[str, Precision] = {
    **dict.fromkeys(("float32", "float", "fp32", "f32", "single", "32", "32-true", "no", "torch.float32"), "fp32"),
    **dict.fromkeys(("bfloat16", "bfloat", "bf16-mixed", "bf16-true", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("float16", "half", "f16", "16", "16-mixed", "fp16-mixed", "16-true", "torch.float16"), "fp16"),
}
"""What PyTorch, Hugging Face and Lightning call them."""

AutoMeaning = Literal["default", "resolved", "refused"]


@dataclass(frozen=True, slots=True)
class Honoured:
    """Handed to the engine as written."""

    kind: Kind
    auto: AutoMeaning = "default"
    """What "auto" means: DeepSpeed's default, a value computed by `resolve_auto`, or an error."""


@dataclass(frozen=True, slots=True)
class Derived:
    """Follows from the run file: "auto", or the same value."""

    kind: Kind
    follows: str


@dataclass(frozen=True, slots=True)
class Unused:
    """Accepted and left out; a value other than `quiet` is told of, with the reason."""

    kind: Kind
    reason: str
    quiet: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """Cannot be had, unless the value asks for nothing."""

    reason: str
    instead: str
    harmless: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Off:
    """A section that may stand only while its switch is off; its keys are known, so that a misspelt one is found."""

    reason: str
    instead: str
    keys: Mapping[str, Any]
    switch: str = "enabled"
    off: tuple[object, ...] = (False, None)


@dataclass(frozen=True, slots=True)
class ByType:
    """A section of ``type`` and ``params``: the type says which parameters there are."""

    params: Mapping[str, Mapping[str, Any]]
    """The rules of the parameters, by type."""
    required: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The parameters that have no default, by type."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Rules of the keys beside ``type`` and ``params``."""
    refused: Mapping[str, Refused] = field(default_factory=dict)
    """Types that DeepSpeed has and that cannot be had here, with the reason."""


Rule = Honoured | Derived | Unused | Refused | Off | ByType | Mapping[str, Any]
"""A mapping is a section: its keys and their rules."""
