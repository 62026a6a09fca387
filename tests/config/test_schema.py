"""The JSON schema of the run file: it accepts our run files, and marks what a single value or key has wrong."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.cli.override_argument import complete_override
from megalite.config.schema import run_file_schema
from megalite.config.yaml12 import Loader

ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "examples").glob("*/run.yaml"))]
SCHEMA = run_file_schema()
TYPES: Mapping[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip


def faults(value: Any, schema: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """The part of JSON schema that the run file's has."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        found = [list(faults(value, one, at)) for one in schema["anyOf"]]
        yield from () if not all(found) else min(found, key=len)
        return
    if "type" in schema and not isinstance(value, TYPES[schema["type"]]):
        yield f"{at} is no {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"] or value != schema.get("const", value):
        yield f"{at}={value}"
    if not schema.get("minimum", float("-inf")) <= (value if isinstance(value, int | float) else float("inf")):
        yield f"{at}={value} is too small"
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from faults(item, schema.get("items", {}), f"{at}.{number}")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (f"{at}.{key} is missing" for key in schema.get("required", ()) if key not in value)
        for key, item in value.items():
            if key in known:
                yield from faults(item, known[key], f"{at}.{key}")
            elif schema.get("additionalProperties", True) is False:
                yield f"{at}.{key} is no key"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name + "/" + path.name)
def test_our_run_files_fit_the_schema_that_they_name(path: Path) -> None:
    first, *_ = path.read_text().splitlines()
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == ROOT / "docs/reference/run_file.schema.json"
    assert list(faults(yaml.load(path.read_text(), Loader), SCHEMA)) == []


def test_the_file_of_the_schema_is_that_of_the_code() -> None:
    written = json.loads((ROOT / "docs/reference/run_file.schema.json").read_text())
    assert written == json.loads(json.dumps(SCHEMA)), "make it anew: make docs-pages"


@pytest.mark.parametrize(
    ("section", "key", "value", "fault"),
    [
        ("train", "stepz", 1, ".train.stepz is no key"),
        ("train", "steps", "many", ".train.steps is no integer"),
        ("train", "steps", 0, ".train.steps=0 is too small"),
        ("parallel", "schedule", "1f2b", ".parallel.schedule=1f2b"),
        ("train", "optimizer", {"name": "adam"}, ".train.optimizer.name=adam"),
        ("model", "architecture", "lama", ".model.architecture=lama"),
        ("checkpoint", "async", "yes", ".checkpoint.async is no boolean"),
    ],
)
def test_a_mistake_is_marked(section: str, key: str, value: object, fault: str) -> None:
    content = yaml.load((ROOT / "configs/llama_1b.yaml").read_text(), Loader)
    content.setdefault(section, {})[key] = value
    assert fault in list(faults(content, SCHEMA))


def test_keys_have_their_meaning() -> None:
    train = SCHEMA["$defs"]["TrainSection"]["properties"]
    assert train["eval_every"]["description"] == "Steps between evaluations; 0 means never."
    assert "null" not in json.dumps([found.get("default") for found in train.values() if "default" in found])
    assert "asynchronous" not in SCHEMA["$defs"]["CheckpointSection"]["properties"]
    assert "origin" not in SCHEMA["properties"]


def test_a_shell_completes_keys_and_values() -> None:
    assert complete_override("parallel.sch") == ["parallel.schedule="]
    assert complete_override("parallel.schedule=zb") == ["parallel.schedule=zb_h1", "parallel.schedule=zb_v"]
    assert complete_override("train.sched") == ["train.schedule.", *complete_override("train.schedule.")]
    assert "deepspeed.zero_optimization.stage=" in complete_override("deepspeed.zero_optimization.st")
    assert complete_override("checkpoint.async=") == ["checkpoint.async=true", "checkpoint.async=false"]
    assert complete_override("no_such=") == []
    assert complete_override("train.no.such=") == []
