"""The tables of docs/reference/run_file.md: keys, allowed values and defaults come from the sections of the run file.

The page keeps the last column, what a key means, and the defaults that are no plain value. `run_file_page` writes the
other cells anew. A key that is new gets a row without a meaning, and a row whose key is gone is dropped; a test fails
on either until the page is complete.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from megalite.config.data import DataSection, DataSource, ValidationSet
from megalite.config.run_config import RunConfig
from megalite.config.sections import (
    CheckpointSection,
    OptimizerSection,
    ParallelSection,
    ParameterGroupSection,
    RampupSection,
    RunSection,
    ScheduleSection,
    SpikeSection,
    TrainSection,
)
from megalite.model.config import ModelConfig, RopeScaling
from megalite.model.registry import FAMILIES
from megalite.settings.section import Section, fields_of, sections_in
from megalite.settings.validation import show
from megalite.settings.values import Kind

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "run_file.md"
HEAD = "| key | default | allowed | meaning |\n| --- | --- | --- | --- |\n"
REQUIRED = "required"
GROUPS: Mapping[str, tuple[str, type[Section]]] = {
    "run": ("run.", RunSection),
    "model": ("model.", ModelConfig),
    "model.rope_scaling": ("model.rope_scaling.", RopeScaling),
    **{f"model {family.name}": ("model.", family.config) for family in FAMILIES.values()},
    "data": ("data.", DataSection),
    "data.train": ("data.train[].", DataSource),
    "data.valid": ("data.valid[].", ValidationSet),
    "parallel": ("parallel.", ParallelSection),
    "train": ("train.", TrainSection),
    "train.optimizer": ("train.optimizer.", OptimizerSection),
    "train.optimizer.groups": ("train.optimizer.groups[].", ParameterGroupSection),
    "train.schedule": ("train.schedule.", ScheduleSection),
    "train.batch_size_rampup": ("train.batch_size_rampup.", RampupSection),
    "train.spike": ("train.spike.", SpikeSection),
    "checkpoint": ("checkpoint.", CheckpointSection),
    "top": ("", RunConfig),
}
"""Each table of the page: what stands before its keys, and the section that they are fields of."""
_TABLE = re.compile(r"<!-- keys: (?P<group>[^>]+) -->\n\n(?P<rows>.*?)\n<!-- end -->\n", re.DOTALL)


def run_file_page(page: str) -> str:
    """Return the page with the tables as the code has them; raise ValueError where a table is missing."""
    groups = [match["group"] for match in _TABLE.finditer(page)]
    if sorted(groups) != sorted(GROUPS):
        raise ValueError(f"the page has the tables {groups}, and {list(GROUPS)} are due")
    return _TABLE.sub(lambda match: _table(match["group"], _kept(match["rows"])), page)


def keys_without_meaning(page: str) -> list[str]:
    """Return the keys whose row says nothing in its last column, or no default where the code has no plain one."""
    rows = [cells for match in _TABLE.finditer(page) for cells in _cells(match["rows"])]
    return [key for key, default, _, meaning in rows if not meaning or not default]


def _table(group: str, kept: Mapping[str, tuple[str, str]]) -> str:
    prefix, section = GROUPS[group]
    rows = "".join(
        f"| {key} | {_default(info, kept.get(key, ('', ''))[0])} | {_allowed(info)} | {kept.get(key, ('', ''))[1]} |\n"
        for key, info in ((f"`{prefix}{name}`", info) for name, info in _fields(group, section))
    )
    return f"<!-- keys: {group} -->\n\n{HEAD}{rows}\n<!-- end -->\n"


def _fields(group: str, section: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the keys of a table: those of an architecture are what it adds to or changes of every model's keys."""
    common = fields_of(ModelConfig) if group.startswith("model ") else {}
    for name, info in fields_of(section).items():
        if name == "architecture" and common:
            continue
        if name in common and _same(info, common[name]):
            continue
        if section is RunConfig and name in ("run", "model", "data", "parallel", "train", "checkpoint"):
            continue
        yield name, info


def _same(one: FieldInfo, other: FieldInfo) -> bool:
    """Whether an architecture has a key as every model has it: default and allowed values alike."""
    if (one.default_factory is None) != (other.default_factory is None):
        return False
    return one.default_factory is not None or one.default == other.default


def _kept(rows: str) -> dict[str, tuple[str, str]]:
    return {key: (default, meaning) for key, default, _, meaning in _cells(rows)}


def _cells(rows: str) -> list[list[str]]:
    lines = [line for line in rows.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def _default(info: FieldInfo, kept: str) -> str:
    if info.is_required():
        return REQUIRED
    plain = isinstance(info.default, bool | int | float | str) or (isinstance(info.default, tuple) and info.default)
    return f"`{_written(info.default)}`" if info.default_factory is None and plain else kept


def _written(value: Any) -> str:
    """Return a default as a run file has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return value if isinstance(value, str) else show(value)


def _allowed(info: FieldInfo) -> str:
    kinds = [kind for kind in info.metadata if isinstance(kind, Kind)] or list(_kinds_in(info.annotation))
    if kinds:
        return kinds[0].words
    choices = [value for literal in _literals(info.annotation) for value in get_args(literal)]
    if choices:
        return ", ".join(f"`{value}`" for value in choices)
    return "a section, see below" if any(sections_in(info.annotation)) else "see the meaning"


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        if part is not NoneType:
            yield from _parts(part)


def _kinds_in(annotation: Any) -> Iterator[Kind]:
    return (part for part in _parts(annotation) if isinstance(part, Kind))


def _literals(annotation: Any) -> Iterator[Any]:
    return (part for part in _parts(annotation) if get_origin(part) is Literal)
