"""Consistency check of a run: settings, code, data and checkpoints that its ranks compare before they form groups."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megalite.checkpoint.discovery import resume_candidates
from megalite.config import RunConfig
from megalite.config.plugins import plugin_code
from megalite.data.sources import open_source
from megalite.launch.consistency import SHOWN_DIGITS, Facts, code_digests, process_facts
from megalite.planning.plan import Plan

_PLACES = frozenset({"run.dir", "data.tokenizer", "data.index_cache"})
_PLACES_ANYWHERE = frozenset({"prefix", "nvme_path"})
"""Settings that are paths, which may differ between hosts; the contents of the paths are compared instead."""


def run_facts(plan: Plan, world_size: int) -> Facts:
    """Return the facts that must be equal on all ranks of a run; of paths, the contents are compared.

    Raises UserError where the data cannot be opened.
    """
    process, config = process_facts(world_size), plan.config
    sources = {f"data.train.{number}": source for number, source in enumerate(config.data.train)}
    sources |= {f"data.valid.{number}": source for number, source in enumerate(config.data.valid)}
    return {
        "launch": process["launch"],
        "run file": dict(_settings(config)),
        "code": process["code"],
        "plugins": {
            name: text for path in map(plugin_code, config.plugins) for name, text in code_digests(path).items()
        },
        "versions": process["versions"],
        "tokenizer": {"data.tokenizer (SHA-256)": (plan.tokenizer_digest or "none")[:SHOWN_DIGITS]},
        "data": {
            f"{name} (fingerprint)": open_source(source, config).fingerprint()[:SHOWN_DIGITS]
            for name, source in sources.items()
        },
        "checkpoints": {
            "the checkpoints in run.dir": ", ".join(folder.name for folder in resume_candidates(config)) or "none",
        },
    }


def _settings(config: RunConfig) -> Iterator[tuple[str, str]]:
    document: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude={"deepspeed"})
    yield from _flat({**document, "deepspeed": dict(config.deepspeed.document)}, ())


def _flat(node: Any, key: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Flatten a tree of settings: yield the dotted key and the JSON text of every leaf."""
    if isinstance(node, list | tuple) and any(isinstance(item, Mapping) for item in node):
        node = {str(number): item for number, item in enumerate(node)}
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _flat(value, (*key, str(name)))
    elif ".".join(key) not in _PLACES and key[-1] not in _PLACES_ANYWHERE:
        yield ".".join(key), json.dumps(node, default=str)
