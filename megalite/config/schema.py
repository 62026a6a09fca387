"""The JSON schema of the run file, with which editors complete and check it."""

import ast
import inspect
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

from megalite.config.data import DataSection
from megalite.config.run_config import RunConfig
from megalite.config.sections import run_sections_in
from megalite.settings.section import Section, fields_of

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def run_file_schema() -> dict[str, Any]:
    """Return the JSON schema of the run file, with the families and names that plugins have registered so far.

    It has the types, ranges and choices of single values, and what each key means. It accepts some files that are
    refused, since it compares no settings with each other. The DeepSpeed JSON is any object.
    """
    schema = RunConfig.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    for section in {*_sections(RunConfig)}:
        described = definitions.get(section.__name__, schema if section is RunConfig else {})
        for key, text in _descriptions(section).items():
            if key in described.get("properties", {}):
                described["properties"][key]["description"] = text
    sources = definitions[DataSection.__name__]["properties"]["train"]
    sources["anyOf"] = [{"type": "string"}, {key: sources.pop(key) for key in ("type", "items")}]
    del schema["properties"]["deepspeed"]["default"]  # the settings as this program holds them
    return _without_null_defaults({"$schema": DIALECT, **schema, "title": "megalite run file"})


def _without_null_defaults(node: Any) -> Any:
    """Leave out defaults that say that nothing is given, which an editor would offer."""
    if isinstance(node, list):
        return [_without_null_defaults(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_null_defaults(item) for key, item in node.items() if (key, item) != ("default", None)}


def _sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for info in fields_of(section).values():
        for inner in run_sections_in(info.annotation):
            yield from _sections(inner)


def _descriptions(section: type[Section]) -> dict[str, str]:
    """Return the documentation of a section's fields, which stands below them in the source, by key."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if issubclass(owner, Section) and owner is not Section:
            (definition,) = ast.parse(dedent(inspect.getsource(owner))).body
            assert isinstance(definition, ast.ClassDef)
            found |= dict(_documented(definition))
    aliases = {name: info.alias or name for name, info in section.model_fields.items()}
    return {aliases[name]: text for name, text in found.items() if name in aliases}


def _documented(definition: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for node, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(following, ast.Expr):
            text = following.value.value if isinstance(following.value, ast.Constant) else None
            if isinstance(text, str):
                yield node.target.id, " ".join(text.split())
