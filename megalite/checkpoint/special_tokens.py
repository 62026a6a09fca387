"""Which tokens begin and end a text of a model, by the files that go with its weights and by what it was trained on.

What ends a text is what transformers ends at for the same files: ``eos_token_id`` of ``generation_config.json``, or of
``config.json`` where there is no such file. Only where neither names a token, it is the tokenizer's: ``eos_token`` of
``tokenizer_config.json`` or ``special_tokens_map.json``, or else the usual name that its vocabulary has. The token that
stood behind every document of the training data ends a text in any case.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from megalite.config.validation import show
from megalite.errors import UserError

TokenId = Annotated[int, Field(ge=0)]
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""The keys of ``config.json`` and ``generation_config.json`` that name tokens by their ids."""


@dataclass(frozen=True, slots=True)
class DocumentTokens:
    """What stood around the documents that a model was trained on."""

    ends: tuple[TokenId, ...] = ()
    """The tokens that were put behind documents."""
    beginning: tuple[TokenId, ...] | None = None
    """The tokens that were put before every document; None where that is not known."""


def named_token(key: str, *settings: Mapping[str, Any]) -> str | None:
    """Return the name of a special token, such as ``eos_token``, from the first settings that tell it.

    The files write it as a text, or as an object with the text as its ``content``.
    """
    for one in settings:
        value = one.get(key)
        name = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(name, str) and name:
            return name
    return None


def declared_ends(settings: Mapping[str, Any], vocab_size: int, where: str) -> list[int]:
    """Return ``eos_token_id`` of settings as a list, empty where it is not told.

    Raises UserError, which begins with `where`, for what is no id of a vocabulary of `vocab_size`.
    """
    told = settings.get("eos_token_id")
    ids = [] if told is None else told if isinstance(told, list) else [told]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise UserError(
                f"{where}: eos_token_id has {show(token)}, and the model has vocab_size={vocab_size}; write ids from 0 "
                f"to {vocab_size - 1}, or remove the key"
            )
    return ids


def text_ends(
    declared: list[int],
    tokenizer_settings: tuple[Mapping[str, Any], ...],
    token_id: Callable[[str], int | None],
    usual: int | None,
    documents: DocumentTokens | None,
) -> list[int]:
    """Return the ids of the tokens that end a text, each once.

    `declared` are those of the generation settings, `token_id` gives the id of a name in the vocabulary, and `usual` is
    the end that the vocabulary itself suggests.
    """
    ends = list(declared)
    if not ends:
        name = named_token("eos_token", *tokenizer_settings)
        found = token_id(name) if name is not None else None
        found = usual if found is None else found
        ends = [] if found is None else [found]
    return list(dict.fromkeys([*ends, *(documents.ends if documents is not None else ())]))
