"""A model type of Hugging Face, as data that is read both ways: its settings, its modules, and what changes nothing.

Names and defaults are those of the classes in transformers: a key that is absent from a ``config.json`` has the
default given here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

REQUIRED = object()
"""The default of a key that a ``config.json`` must have."""
QUERY_KEY_VALUE = ("attention.query", "attention.key", "attention.value")
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Names of the tanh form of GELU."""


@dataclass(frozen=True, slots=True)
class Module:
    """A module of theirs, with a weight and perhaps a bias, and the modules of ours whose parameters these are.

    Several of ours lie in one of theirs one after the other or, `by_head`, the rows of each head together. A
    `transposed` weight is stored ``[in, out]``.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    by_head: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of ``config.json`` and the key of our section `model` that it is.

    Where `words` are given, they turn their values into ours; the first that stands for a value of ours is written.
    """

    theirs: str
    ours: str
    default: object = REQUIRED
    words: Mapping[str, object] | None = None


def same_names(*names: str) -> tuple[Setting, ...]:
    """Return required keys that have the same name in both."""
    return tuple(Setting(name, name) for name in names)


@dataclass(frozen=True, slots=True)
class Fixed:
    """A key that has to have one of these values, the first where it is absent; `reason` says why, for a message."""

    theirs: str
    allowed: tuple[object, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class HuggingFaceFormat:
    """One `model_type`, and the models of ours that are written as it.

    `prefix` stands before every name but the head's, and may be missing. `layers` are the modules of layer ``{}``.
    `flags` are the settings that all its models have on, out of those that tell the formats of a family apart.
    """

    model_type: str
    causal_class: str
    settings: tuple[Setting, ...]
    prefix: str
    embedding: tuple[Module, ...]
    layer: str
    layers: tuple[Module, ...]
    norm: Module
    fixed: tuple[Fixed, ...] = ()
    head: str = "lm_head"
    other_heads: tuple[str, ...] = ()
    """Names that the head has had."""
    flags: frozenset[str] = frozenset()
    optional_flags: tuple[frozenset[str], ...] = ()
    """Groups of further such settings of which a model has all on, or none."""
    rotary: bool = True
    partial_rotary: float | None = None
    """The default share of a head's dims that turn; None where all do."""
    names_window: bool = False
    """Whether the class has keys for a window of attention that is used only where they say so."""
    always_slides: bool = False
    """Whether a window of attention needs no other key to say that it is there."""
    heads_divide: bool = True
    """Whether the class wants the heads to divide the hidden size even where a head's width is given."""
    buffers: tuple[str, ...] = ()
    """How the names end of stored tensors that follow from the settings."""
    inert: frozenset[str] = frozenset()
    """Keys that change nothing of the function, beside those of every format."""

    @property
    def all_flags(self) -> frozenset[str]:
        """Every setting that can be a flag of a model of this type."""
        return self.flags.union(*self.optional_flags)

    def has(self, flags: set[str]) -> bool:
        """Whether there are models of this type with these flags on, and no others."""
        optional = set().union(*(group for group in self.optional_flags if group <= flags))
        return self.flags <= flags and flags - self.flags == optional
