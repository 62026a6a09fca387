"""Consistency check: the facts that all ranks must have in common, and the message for a rank that differs.

A fact is a named value, such as the learning rate under ``train.optimizer.lr``. Facts are grouped by kind; all facts of
a kind have the same fix. Values are compared as text. `rendezvous` sends the facts from rank to rank; this module needs
neither torch nor a process group.
"""

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

Facts = Mapping[str, Mapping[str, str]]
"""Values by kind and name, in the order of comparison."""

FIXES: Mapping[str, str] = {
    "launch": "start all ranks by one launcher, and give each run a MASTER_PORT of its own",
    "run file": "give every rank the same run file, DeepSpeed JSON and overrides",
    "code": "install the same megalite on every host",
    "plugins": "install the same plugins on every host",
    "versions": "install the same versions on every host",
    "tokenizer": "copy rank 0's file to every host, or name one that all hosts share",
    "data": "copy rank 0's files to every host, or name some that all hosts share",
    "checkpoints": "set run.dir to a folder that all hosts share",
}
"""The fix for a difference, by kind of fact."""

SHOWN_DIGITS = 12
"""Characters of a digest that messages show."""


def process_facts(world_size: int) -> dict[str, dict[str, str]]:
    """Return the facts that the ranks of every verb have in common: number of ranks, job, code, versions."""
    return {
        "launch": {
            "WORLD_SIZE": str(world_size),
            **{name: os.environ[name] for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID") if name in os.environ},
        },
        "code": code_digests(Path(__file__).parents[1]),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed", "numpy")},
        },
    }


def code_digests(package: Path) -> dict[str, str]:
    """Return the shortened SHA-256 of every source file of a package, or of one file, by its name in messages."""
    files = sorted(package.rglob("*.py")) if package.is_dir() else [package]
    return {
        f"{path.relative_to(package.parent)} (SHA-256)": hashlib.sha256(path.read_bytes()).hexdigest()[:SHOWN_DIGITS]
        for path in files
    }


def first_difference(mine: Facts, theirs: Facts, host: str) -> str | None:
    """Return the first difference between a rank's facts and those of rank 0 on `host`, with the fix; None if equal."""
    for kind in dict.fromkeys([*theirs, *mine]):
        ours, others = mine.get(kind, {}), theirs.get(kind, {})
        for name in dict.fromkeys([*others, *ours]):
            if ours.get(name) != others.get(name):
                return (
                    f"{name} is {ours.get(name, 'not there')}, on rank 0 ({host}) {others.get(name, 'not there')}; "
                    f"{FIXES[kind]}"
                )
    return None
