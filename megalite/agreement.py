"""What the ranks of a run must have in common, and how one that differs is told of it.

A fact is a value under a name, such as the learning rate under ``train.optimizer.lr``; facts of one kind are mended in
one way. Values are compared as text. No torch, no process group: `rendezvous` carries the facts from rank to rank.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megalite.checkpoint.selection import candidates
from megalite.config import RunConfig
from megalite.data.fingerprint import fingerprint
from megalite.plan import Plan

Facts = Mapping[str, Mapping[str, str]]
"""By kind and name, in the order in which they are compared."""

FIXES: Mapping[str, str] = {
    "launch": "start all ranks by one launcher, and give each run a MASTER_PORT of its own",
    "run file": "give every rank the same run file, DeepSpeed JSON and overrides",
    "code": "install the same megalite on every host",
    "versions": "install the same versions on every host",
    "tokenizer": "copy rank 0's file to every host, or name one that all hosts share",
    "data": "copy rank 0's files to every host, or name some that all hosts share",
    "checkpoints": "set run.dir to a folder that all hosts share",
}
"""What to do about a difference, by kind."""

_PLACES = frozenset({"run.dir", "data.tokenizer", "data.index_cache"})
_PLACES_ANYWHERE = frozenset({"prefix", "nvme_path"})
"""Settings that say where something is. Hosts may have it in different places: what is there is compared instead."""

_SHOWN = 12
"""Characters of a digest that are told."""


def process_facts(world_size: int) -> dict[str, dict[str, str]]:
    """Return what the ranks of any verb have in common: their number, the code and the versions it runs on."""
    return {
        "launch": {
            "WORLD_SIZE": str(world_size),
            **{name: os.environ[name] for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID") if name in os.environ},
        },
        "code": code_digests(Path(__file__).parent),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed", "numpy")},
        },
    }


def run_facts(plan: Plan, world_size: int) -> Facts:
    """Return what the ranks of a run have in common. Paths are not compared, but what they lead to is.

    Raises UserError where the data cannot be opened.
    """
    process, config = process_facts(world_size), plan.config
    sources = {f"data.train.{number}": source.prefix for number, source in enumerate(config.data.train)}
    sources |= {f"data.valid.{number}": source.prefix for number, source in enumerate(config.data.valid)}
    return {
        "launch": process["launch"],
        "run file": dict(_settings(config)),
        "code": process["code"],
        "versions": process["versions"],
        "tokenizer": {"data.tokenizer (SHA-256)": (plan.tokenizer_digest or "none")[:_SHOWN]},
        "data": {f"{name} (fingerprint)": fingerprint(prefix)[:_SHOWN] for name, prefix in sources.items()},
        "checkpoints": {
            "the checkpoints in run.dir": ", ".join(folder.name for folder in candidates(config)) or "none",
        },
    }


def code_digests(package: Path) -> dict[str, str]:
    """Return the SHA-256 of every source file of a package, shortened, by what it is called in messages."""
    files = sorted(package.rglob("*.py"))
    return {
        f"{path.relative_to(package.parent)} (SHA-256)": hashlib.sha256(path.read_bytes()).hexdigest()[:_SHOWN]
        for path in files
    }


def difference(mine: Facts, theirs: Facts, host: str) -> str | None:
    """Return what tells a rank's facts from those of rank 0 on `host`, with the fix; the first of several."""
    for kind in dict.fromkeys([*theirs, *mine]):
        ours, others = mine.get(kind, {}), theirs.get(kind, {})
        for name in dict.fromkeys([*others, *ours]):
            if ours.get(name) != others.get(name):
                return (
                    f"{name} is {ours.get(name, 'not there')}, on rank 0 ({host}) {others.get(name, 'not there')}; "
                    f"{FIXES[kind]}"
                )
    return None


def _settings(config: RunConfig) -> Iterator[tuple[str, str]]:
    document: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude={"deepspeed"})
    yield from _flat({**document, "deepspeed": dict(config.deepspeed.document)}, ())


def _flat(node: Any, key: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Take a tree of settings apart: every leaf, written as JSON, under its dotted key."""
    if isinstance(node, list | tuple) and any(isinstance(item, Mapping) for item in node):
        node = {str(number): item for number, item in enumerate(node)}
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _flat(value, (*key, str(name)))
    elif ".".join(key) not in _PLACES and key[-1] not in _PLACES_ANYWHERE:
        yield ".".join(key), json.dumps(node, default=str)
