"""Conversations as training text: messages to token ids, and a mask that says which the loss counts as targets.

Counted are the assistant's words and what ends its turn, nothing else. A template writes a prefix before each message
and a suffix after it; its control tokens are single ids, and nothing in a message ever becomes one of them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megalite.config.yaml12 import Loader
from megalite.data.tokenizer import Tokenizer
from megalite.data.tokenizers.inner_text import InnerText
from megalite.errors import UserError, nearest

ASSISTANT = "assistant"
_SHARE_GPT_ROLES = {"human": "user", "gpt": ASSISTANT}


@dataclass(frozen=True, slots=True)
class Turn:
    """What stands around a message."""

    prefix: str = ""
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How a conversation is written: `start`, then each message within its role's prefix and suffix, then `end`.

    Of these texts the `control_tokens` become the ids of that name; all else is encoded as text.
    """

    name: str
    roles: tuple[tuple[str, Turn], ...]
    control_tokens: tuple[str, ...] = ()
    start: str = ""
    end: str = ""
    trim: bool = False
    """Spaces and line ends around a message's content are taken off."""

    def encode(self, messages: object, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """Return (int32 ids, uint8 mask) of a conversation; the mask is 1 where the loss counts a token as a target.

        `messages` is a list of ``{role, content}`` or of ``{from, value}``, or a record that holds such a list as
        ``messages`` or ``conversations``, or an ``{instruction, input, output}``.

        Raises ValueError where they are malformed, UserError where the tokenizer lacks a control token.
        """
        return _encoder(self, tokenizer).encode(list(self._parts(messages)))

    def require(self, tokenizer: Tokenizer) -> None:
        """Raise UserError where the tokenizer lacks one of the template's control tokens."""
        _encoder(self, tokenizer)

    def _parts(self, messages: object) -> Iterator["_Part"]:
        """Yield the conversation's texts in order."""
        turns = dict(self.roles)
        conversation = _conversation(messages)
        yield _Part(self.start)
        for number, (role, content) in enumerate(conversation, start=1):
            if role not in turns:
                raise ValueError(
                    f"message {number}: the template has no role {role[:40]!r}, but {', '.join(sorted(turns))}"
                )
            counts = role == ASSISTANT
            yield _Part(turns[role].prefix)
            yield _Part(content.strip() if self.trim else content, counts, is_content=True)
            yield _Part(turns[role].suffix, counts)
        yield _Part(self.end)
        if all(role != ASSISTANT for role, _ in conversation):
            raise ValueError("no message of the assistant's, so nothing to learn")


@dataclass(frozen=True, slots=True)
class _Part:
    """A text of a conversation, whether the loss counts it, and whether it was written by strangers."""

    text: str
    counts: bool = False
    is_content: bool = False


def _conversation(messages: object) -> list[tuple[str, str]]:
    """Return (role, content) of each message."""
    if isinstance(messages, Mapping):
        messages = _of_record(messages)
    if not isinstance(messages, list):
        raise ValueError(f"messages are no list but {_kind(messages)}")
    if not messages:
        raise ValueError("no messages")
    return [_message(number, message) for number, message in enumerate(messages, start=1)]


def _of_record(record: Mapping[Any, Any]) -> object:
    for key in ("messages", "conversations"):
        if key in record:
            return record[key]
    if "instruction" not in record or "output" not in record:
        raise ValueError("the record has neither messages nor conversations, nor an instruction and its output")
    question = [text for key in ("instruction", "input") if (text := record.get(key)) not in (None, "")]
    if not all(isinstance(text, str) for text in question):
        raise ValueError("instruction or input is no text")
    return [{"role": "user", "content": "\n\n".join(question)}, {"role": ASSISTANT, "content": record["output"]}]


def _message(number: int, message: object) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is no record but {_kind(message)}")
    role_key, content_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    for key in (role_key, content_key):
        if key not in message:
            raise ValueError(f"message {number} has no {key}")
        if not isinstance(message[key], str):
            raise ValueError(f"message {number}: {key} is no text but {_kind(message[key])}")
    role: str = message[role_key]
    return _SHARE_GPT_ROLES.get(role, role) if role_key == "from" else role, message[content_key]


def _kind(value: object) -> str:
    kinds = {dict: "a record", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


@lru_cache(maxsize=4)
def _encoder(template: ChatTemplate, tokenizer: Tokenizer) -> "_Encoder":
    return _Encoder(template, tokenizer)


class _Encoder:
    """A template and a tokenizer that has its control tokens."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._ids: dict[str, int] = {}
        for name in template.control_tokens:
            if name not in tokenizer.control_tokens:
                raise UserError(_lacking(template, name, tokenizer))
            self._ids[name] = tokenizer.control_tokens[name]
        self._encode = tokenizer.message_encoder(template.control_tokens)
        self._inner = InnerText(tokenizer, self._encode)
        longest_first = sorted(map(re.escape, template.control_tokens), key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(longest_first)})") if longest_first else None

    def encode(self, parts: list[_Part]) -> tuple[np.ndarray, np.ndarray]:
        """Encode neighbouring texts as one, except where the loss begins or ends to count them."""
        ids: list[int] = []
        mask: list[int] = []
        pieces = [(piece, part.counts) for part in parts for piece in self._pieces(part)]
        for (is_text, counts), run in groupby(pieces, lambda piece: (isinstance(piece[0], str), piece[1])):
            if is_text:
                text = "".join(str(piece) for piece, _ in run)
                found = self._inner.encode(text) if ids else self._encode(text)
            else:
                found = [int(piece) for piece, _ in run]
            ids += found
            mask += [int(counts)] * len(found)
        return np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8)

    def _pieces(self, part: _Part) -> list[str | int]:
        """Return texts and ids of control tokens in turn; no text is empty."""
        if part.is_content or self._control is None:
            return [part.text] if part.text else []
        return [self._ids.get(piece, piece) for piece in self._control.split(part.text) if piece]


def _lacking(template: ChatTemplate, name: str, tokenizer: Tokenizer) -> str:
    if tokenizer.token_id(name) is not None:
        found = f"{name!r} is an ordinary piece of the tokenizer, which any message may hold"
    else:
        found = f"the tokenizer has no token {name!r}{nearest(name, tokenizer.control_tokens)}"
    return f"chat template {template.name}: {found}; take a tokenizer with this control token, or a template without it"


_ROLES = ("system", "user", ASSISTANT)
BUILT_IN = {
    template.name: template
    for template in (
        ChatTemplate(
            "chatml",
            tuple((role, Turn(f"<|im_start|>{role}\n", "<|im_end|>\n")) for role in (*_ROLES, "tool")),
            control_tokens=("<|im_start|>", "<|im_end|>"),
        ),
        ChatTemplate(
            "llama3",
            tuple(
                (role, Turn(f"<|start_header_id|>{name}<|end_header_id|>\n\n", "<|eot_id|>"))
                for role, name in (*zip(_ROLES, _ROLES, strict=True), ("tool", "ipython"), ("ipython", "ipython"))
            ),
            control_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            start="<|begin_of_text|>",
            trim=True,
        ),
        ChatTemplate("plain", tuple((role, Turn(f"{role.title()}:\n", "\n\n")) for role in _ROLES)),
    )
}


def load_chat_template(name_or_path: str | Path) -> ChatTemplate:
    """Return a built-in template by its name, or read one from a YAML or JSON file.

    The file has `roles`, each with a `prefix` and a `suffix`, among them `assistant`; and, where wanted,
    `control_tokens`, `start`, `end` and `trim`. Raises UserError where there is none, or the file is malformed.
    """
    if str(name_or_path) in BUILT_IN:
        return BUILT_IN[str(name_or_path)]
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(
            f"chat template {name_or_path}: neither built in{nearest(str(name_or_path), BUILT_IN)} nor a file; name a "
            "built-in one, or a YAML or JSON file"
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{path}: not YAML or JSON ({' '.join(str(error).split())}); write `roles:` and so on"
        ) from error
    return _TemplateFile(path).read(content)


@dataclass(frozen=True, slots=True)
class _TemplateFile:
    path: Path

    def read(self, content: object) -> ChatTemplate:
        """Return the template of a file's content."""
        fields = self._mapping(content, "", ("roles", "control_tokens", "start", "end", "trim"))
        roles = self._mapping(fields.get("roles"), "roles", None)
        if ASSISTANT not in roles:
            raise self._error("roles", f"has no {ASSISTANT}, whose words are what is learnt; write it")
        names = fields.get("control_tokens", [])
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise self._error("control_tokens", "is no list of tokens; write such as ['<|im_start|>', '<|im_end|>']")
        trim = fields.get("trim", False)
        if not isinstance(trim, bool):
            raise self._error("trim", "is neither true nor false; write one")
        turns = tuple((str(role), self._turn(str(role), turn)) for role, turn in roles.items())
        start, end = (self._text(fields, key, key) for key in ("start", "end"))
        template = ChatTemplate(str(self.path), turns, tuple(names), start, end, trim)
        self._check_used(template)
        return template

    def _turn(self, role: str, content: object) -> Turn:
        fields = self._mapping(content, f"roles.{role}", ("prefix", "suffix"))
        prefix, suffix = (self._text(fields, key, f"roles.{role}.{key}") for key in ("prefix", "suffix"))
        return Turn(prefix, suffix)

    def _check_used(self, template: ChatTemplate) -> None:
        texts = [
            template.start,
            template.end,
            *(text for _, turn in template.roles for text in (turn.prefix, turn.suffix)),
        ]
        for name in template.control_tokens:
            if not any(name in text for text in texts):
                raise self._error("control_tokens", f"names {name!r}, which stands nowhere in the template; remove it")

    def _mapping(self, content: object, where: str, allowed: tuple[str, ...] | None) -> Mapping[str, Any]:
        if not isinstance(content, dict) or not content:
            raise self._error(where or "the file", f"holds no keys; write {', '.join(allowed or _ROLES)}")
        for key in content:
            if allowed is not None and key not in allowed:
                raise self._error(f"{where}.{key}".lstrip("."), f"is not known{nearest(key, allowed)}")
        return content

    def _text(self, fields: Mapping[str, Any], key: str, where: str) -> str:
        text = fields.get(key, "")
        if not isinstance(text, str):
            raise self._error(where, f"is {_kind(text)}; write a text in quotes")
        return text

    def _error(self, where: str, problem: str) -> UserError:
        return UserError(f"{self.path}: {where} {problem}")
