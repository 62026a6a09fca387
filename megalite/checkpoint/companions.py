"""The small files that go with a model's weights wherever these go: its tokenizer, and how to generate with it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
GENERATION_CONFIG = "generation_config.json"
TIKTOKEN_SUFFIX = ".tiktoken"
"""How the name of a file of tiktoken's ranks ends, before which its encoding's name stands."""


def companions_among(folder: Path, names: Iterable[str]) -> Mapping[str, Path]:
    """Return those of a folder's files that go with the weights."""
    return {name: folder / name for name in names if name in COMPANIONS or name.endswith(TIKTOKEN_SUFFIX)}
