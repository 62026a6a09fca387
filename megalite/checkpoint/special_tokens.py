"""The tokens that begin and end a model's texts, from its model files and from its training data.

Generation ends at the same tokens as in transformers: ``eos_token_id`` of ``generation_config.json``, or of
``config.json`` if there is no such file. If neither file names a token, the tokenizer's is used: ``eos_token`` of
``tokenizer_config.json`` or ``special_tokens_map.json``, or else the conventional name that its vocabulary has. The
token that followed every document of the training data ends a text in any case.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from megalite.errors import UserError
from megalite.settings.validation import show

TokenId = Annotated[int, Field(ge=0)]
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""The keys of ``config.json`` and ``generation_config.json`` that name tokens by their ids."""


@dataclass(frozen=True, slots=True)
class DocumentTokens:
    """The tokens around the documents of a model's training data."""

    ends: tuple[TokenId, ...] = ()
    """The tokens that followed documents."""
    beginning: tuple[TokenId, ...] | None = None
    """The tokens that preceded every document; None if unknown."""


def named_token(key: str, *settings: Mapping[str, Any]) -> str | None:
    """Return the name of a special token, such as ``eos_token``, from the first settings that define it.

    The files store the name as a string, or as an object with the string as its ``content``.
    """
    for mapping in settings:
        value = mapping.get(key)
        name = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(name, str) and name:
            return name
    return None


def declared_end_ids(settings: Mapping[str, Any], vocab_size: int, where: str) -> list[int]:
    """Return ``eos_token_id`` of settings as a list, empty if the key is missing.

    Raises UserError, with `where` at the start of the message, for a value that is not an id below `vocab_size`.
    """
    declared = settings.get("eos_token_id")
    ids = [] if declared is None else declared if isinstance(declared, list) else [declared]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise UserError(
                f"{where}: eos_token_id has {show(token)}, and the model has vocab_size={vocab_size}; write ids from 0 "
                f"to {vocab_size - 1}, or remove the key"
            )
    return ids


def end_token_ids(
    declared: list[int],
    tokenizer_settings: tuple[Mapping[str, Any], ...],
    token_id: Callable[[str], int | None],
    usual: int | None,
    documents: DocumentTokens | None,
) -> list[int]:
    """Return the ids of the tokens that end a text, without duplicates.

    `declared` are the ids of the generation settings, `token_id` looks up a name in the vocabulary, and `usual` is the
    id of the vocabulary's conventional end token.
    """
    ends = list(declared)
    if not ends:
        name = named_token("eos_token", *tokenizer_settings)
        found = token_id(name) if name is not None else None
        found = usual if found is None else found
        ends = [] if found is None else [found]
    return list(dict.fromkeys([*ends, *(documents.ends if documents is not None else ())]))
