"""The section `model` of a run that begins with weights: theirs, and what the run file may state beside it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megalite.model.registry import FAMILIES
from megalite.settings.section import FilePath
from megalite.settings.validation import Fault, show

SectionReader = Callable[[Path], Mapping[str, Any]]
"""Returns the section `model` of the weights at a path, every key of it; raises UserError where there are none."""

FREE = ("attention_dropout", "hidden_dropout", "initializer_range")
"""Keys that are of a run and not of weights: a run may state its own."""

_OF_ANY_SHAPE = (
    *("rope_theta", "rope_scaling", "rotary_pct", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    *("use_parallel_residual", "hidden_act"),
)
"""Keys that no weight's shape follows from: weights may be trained on with another value, where a whole section states
it."""


def fill_model(document: dict[str, Any], read_section: SectionReader) -> list[Fault]:
    """Complete the section `model` of a run file by that of the weights of its `init_from`; return what disagrees.

    A section that is complete by itself stays as it is: `CheckpointRequirements.require_weights` looks at its shapes.
    """
    stated, section = document.get("init_from"), document.get("model")
    section = {} if section is None else section
    if stated is None or not isinstance(section, Mapping) or _is_complete(section):
        return []
    try:
        path = TypeAdapter(FilePath).validate_python(stated)
    except ValidationError:
        return []  # told with the other faults of the file
    of_weights = read_section(path)
    given = {key: value for key, value in section.items() if value is not None}
    faults = []
    for key, value in given.items():
        if key in of_weights and key not in FREE and _plain(value) != _plain(of_weights[key]):
            text = f"={show(value)} is not that of init_from={stated}, {show(of_weights[key])}"
            fixes = ["delete it to train those weights on"]
            fixes += ["write the whole section model to train them on so"] * (key in _OF_ANY_SHAPE)
            fixes += ["delete init_from to train from scratch"]
            faults.append(Fault(("model", str(key)), f"{text}; {', or '.join(fixes)}"))
    document["model"] = {**of_weights, **given}
    return faults


def _is_complete(section: Mapping[str, Any]) -> bool:
    family = FAMILIES.get(str(section.get("architecture")))
    if family is None:
        return "architecture" in section  # of no known name, which is told
    return all(section.get(name) is not None for name, info in family.config.model_fields.items() if info.is_required())


def _plain(value: Any) -> Any:
    """Return a value such that settings that are not given and settings that are null are the same."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return value
