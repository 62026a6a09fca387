"""The arguments ``section.key=value`` of verbs that take a run file, with their completion in a shell."""

from collections.abc import Iterator
from typing import Annotated

import typer


def complete_override(incomplete: str) -> list[str]:
    """Return the keys of the run file that begin so; after ``key=`` the values of a key with a few allowed ones."""
    from megalite.config.run_config import RunConfig
    from megalite.config.suggestions import known_keys

    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={choice}" for choice in _choices(key) if choice.startswith(value)]
    keys = known_keys(RunConfig)
    sections = {found.rpartition(".")[0] for found in keys}
    return sorted(f"{found}{'.' if found in sections else '='}" for found in keys if found.startswith(key))


def _choices(key: str) -> Iterator[str]:
    """Yield the values of a key that allows only a few."""
    from megalite.config.run_config import RunConfig
    from megalite.config.sections import run_sections_in
    from megalite.settings.section import fields_of
    from megalite.settings.values import FLAG, Kind

    *sections, name = key.split(".")
    owners = [RunConfig]
    for section in sections:
        infos = [fields_of(owner)[section] for owner in owners if section in fields_of(owner)]
        owners = [inner for info in infos for inner in run_sections_in(info.annotation)]
    for info in (fields_of(owner)[name] for owner in owners if name in fields_of(owner)):
        for kind in (item for item in info.metadata if isinstance(item, Kind)):
            yield from ("true", "false") if kind is FLAG else map(str, kind.json_schema.get("enum", ()))


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="section.key=value", help="Settings in place of the run file's.", autocompletion=complete_override
    ),
]
