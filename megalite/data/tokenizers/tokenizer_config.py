"""What ``tokenizer_config.json`` and its neighbours say beside a tokenizer's own file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megalite.errors import UserError
from megalite.text_encoding import read_utf8

NAME = "tokenizer_config.json"


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, nothing where there is no file; raise UserError for anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_utf8(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; mend or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; mend or remove it")
    return content


class NamedTokens(Protocol):
    """What a tokenizer's own file says of its control tokens."""

    @property
    def leading_id(self) -> int | None:
        """The token that the file puts before every text."""
        ...

    def token_id(self, name: str) -> int | None:
        """Return the id of a token by its name."""
        ...


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """The content of a ``tokenizer_config.json``."""

    path: Path
    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def beside(cls, tokenizer: Path) -> "TokenizerConfig":
        """Read what lies beside a tokenizer's file, or in its folder."""
        path = (tokenizer if tokenizer.is_dir() else tokenizer.parent) / NAME
        return cls(path, read_object(path))

    def name_of(self, key: str) -> str | None:
        """Return the name of a token, such as ``eos_token``, which may be written as a text or as a record."""
        token = self.content.get(key)
        name = token.get("content") if isinstance(token, Mapping) else token
        return name if isinstance(name, str) else None

    def puts_before(self, tokenizer: NamedTokens) -> int | None:
        """Return the token that stands before every text by this file, else by the tokenizer's own."""
        told = self.content.get("add_bos_token")
        if isinstance(told, bool):
            name = self.name_of("bos_token")
            return tokenizer.token_id(name) if told and name is not None else None
        return tokenizer.leading_id
