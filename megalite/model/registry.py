"""The registry of model families, by the names that a run file gives them; plugins add to it."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails

from megalite.model.config import ModelConfig
from megalite.model.families import gpt2, gpt_neox, llama
from megalite.model.family import Family
from megalite.registry import Registry
from megalite.settings.validation import Fault, FaultsError, alternatives, show
from megalite.settings.values import nearest_value

FAMILIES: Registry[Family] = Registry("model family")


def register_family(family: Family) -> None:
    """Add a family; raise ValueError if another family has its name, or reads one of its types of Hugging Face."""
    theirs = {form.model_type: known.name for known in FAMILIES.values() for form in known.hugging_face}
    for form in family.hugging_face:
        if theirs.get(form.model_type, family.name) != family.name:
            raise ValueError(f"model_type {form.model_type!r} is read by the family {theirs[form.model_type]} already")
    FAMILIES.register(family.name, defined_by=family.config)(family)


for _family in (llama.FAMILY, gpt2.FAMILY, gpt_neox.FAMILY):
    register_family(_family)


def family_of(config: ModelConfig) -> Family:
    """Return the family of a configuration."""
    return FAMILIES[config.architecture]


def read_model(section: Mapping[str, Any] | ModelConfig) -> ModelConfig:
    """Return a section `model` as the configuration of its family.

    Raises:
        ValidationError: a ValueError; no family has the architecture's name, or the family does not allow the section.
    """
    if isinstance(section, ModelConfig):
        return section
    architecture = section.get("architecture")
    if isinstance(architecture, str) and architecture in FAMILIES:
        return FAMILIES[architecture].config.model_validate(dict(section))
    if architecture is None:
        text = f" is missing; write {alternatives(FAMILIES)}"
    else:
        other_names = {other: family.name for family in FAMILIES.values() for other in family.other_names}
        near = nearest_value(architecture, tuple(FAMILIES), other_names)
        text = f"={show(architecture)} is not {alternatives(FAMILIES)}{near}"
    error = FaultsError([Fault((), text)])
    details = InitErrorDetails(type="value_error", loc=("architecture",), input=architecture, ctx={"error": error})
    raise ValidationError.from_exception_data("model", [details])
