"""The registry of model families, by the names that a run file gives them; plugins add to it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails

from megalite.model.config import ModelConfig
from megalite.model.families import gpt2, gpt_neox, llama
from megalite.model.family import Family
from megalite.settings.validation import Fault, FaultsError, alternatives, show
from megalite.settings.values import nearest_value

_families = {family.name: family for family in (llama.FAMILY, gpt2.FAMILY, gpt_neox.FAMILY)}


def register(family: Family) -> None:
    """Add a family; raise ValueError if another family has its name, or reads one of its types of Hugging Face."""
    if (other := _families.get(family.name, family)) is not family:
        raise ValueError(f"model.architecture={show(other.name)} is a family already; name the new one differently")
    theirs = {one.model_type: known.name for known in _families.values() for one in known.hugging_face}
    for one in family.hugging_face:
        if theirs.get(one.model_type, family.name) != family.name:
            raise ValueError(f"model_type={show(one.model_type)} is read by the family {theirs[one.model_type]}")
    _families[family.name] = family


def families() -> Mapping[str, Family]:
    """Return the registered families by name, those of megalite first."""
    return MappingProxyType(_families)


def family_of(config: ModelConfig) -> Family:
    """Return the family of a configuration."""
    return _families[config.architecture]


def read_model(section: Mapping[str, Any] | ModelConfig) -> ModelConfig:
    """Return a section `model` as the configuration of its family.

    Raises:
        ValidationError: a ValueError; no family has the architecture's name, or the family does not allow the section.
    """
    if isinstance(section, ModelConfig):
        return section
    architecture = section.get("architecture")
    if isinstance(architecture, str) and architecture in _families:
        return _families[architecture].config.model_validate(dict(section))
    if architecture is None:
        text = f" is missing; write {alternatives(_families)}"
    else:
        other_names = {other: family.name for family in _families.values() for other in family.other_names}
        near = nearest_value(architecture, tuple(_families), other_names)
        text = f"={show(architecture)} is not {alternatives(_families)}{near}"
    error = FaultsError([Fault((), text)])
    details = InitErrorDetails(type="value_error", loc=("architecture",), input=architecture, ctx={"error": error})
    raise ValidationError.from_exception_data("model", [details])
