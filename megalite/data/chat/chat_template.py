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

from megalite.config.text_file import read_text
from megalite.config.yaml12 import Loader
from megalite.data.chat.conversations import (
    ASSISTANT,
    FUNCTION_CALL,
    OTHER_ROLES,
    SYSTEM,
    Conversation,
    Message,
    kind,
    read_calls,
    read_conversation,
)
from megalite.data.tokenizers.base import Tokenizer
from megalite.data.tokenizers.inner_text import InnerText
from megalite.errors import UserError, did_you_mean, nearest


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
    reasoning: Turn | None = None
    """What stands around the assistant's reasoning, which goes before its content."""
    tool_call: Turn | None = None
    """What stands around each call of a tool, which go behind the assistant's content, a line each."""
    tools: Turn | None = None
    """What stands around the descriptions of the tools, a line each, at the end of the system message."""

    def encode(self, messages: object, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """Return (int32 ids, uint8 mask) of a conversation; the mask is 1 where the loss counts a token as a target.

        `messages` is what `read_conversation` reads: a list of messages, or a record in one of the usual forms.

        Raises ValueError where they are malformed, UserError where the tokenizer lacks a control token.
        """
        return self.encode_conversation(read_conversation(messages), tokenizer)

    def encode_conversation(self, conversation: Conversation, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """Return (int32 ids, uint8 mask) of a conversation that was read before, as `encode`.

        Raises ValueError for a role, or for tools, calls and reasoning, for which the template has no place.
        """
        return _encoder(self, tokenizer).encode(list(self._parts(conversation)))

    def require(self, tokenizer: Tokenizer) -> None:
        """Raise UserError where the tokenizer lacks one of the template's control tokens."""
        _encoder(self, tokenizer)

    @property
    def texts(self) -> tuple[str, ...]:
        """All that the template itself may write."""
        turns = [*(turn for _, turn in self.roles), *filter(None, (self.tools, self.reasoning, self.tool_call))]
        return (self.start, self.end, *(text for turn in turns for text in (turn.prefix, turn.suffix)))

    def _parts(self, conversation: Conversation) -> Iterator["_Part"]:
        """Yield the conversation's texts in order."""
        turns = dict(self.roles)
        messages, tools = conversation.messages, list(self._tools(conversation))
        if tools and self._role(messages[0].role, turns) != SYSTEM:
            messages = (Message(SYSTEM, ""), *messages)
        learnt = told = False
        yield _Part(self.start)
        for number, message in enumerate(messages, start=1 - (len(messages) - len(conversation.messages))):
            role = self._role(message.role, turns)
            if role not in turns:
                raise ValueError(
                    f"message {number}: the template has no role {role[:40]!r}, but {', '.join(sorted(turns))}"
                    f"{did_you_mean(role.lower(), turns)}; rename the role, or give a template file that has it"
                )
            told |= role == ASSISTANT
            counts = role == ASSISTANT and message.counts
            learnt |= counts
            yield _Part(turns[role].prefix)
            if role == ASSISTANT:
                yield from self._said(number, message, counts)
            else:
                content = message.content.strip() if self.trim else message.content
                yield _Part(content, is_content=True)
            if tools and role == SYSTEM:
                yield _Part("\n\n" if message.content else "")
                yield from tools
                tools = []
            yield _Part(turns[role].suffix, counts)
        yield _Part(self.end)
        if not learnt:
            counting = " counts" if told else ""
            raise ValueError(f"no message of the assistant's{counting}, so nothing to learn")

    @staticmethod
    def _role(role: str, turns: Mapping[str, Turn]) -> str:
        """Return the role of the template by which a message of another name is written."""
        return role if role in turns else OTHER_ROLES.get(role, role)

    def _said(self, number: int, message: Message, counts: bool) -> Iterator["_Part"]:
        """Yield what the assistant thinks, says and calls."""
        content = message.content.strip() if self.trim else message.content
        calls = message.calls
        if message.role == FUNCTION_CALL:
            calls, content = read_calls(f"message {number}", content), ""
        if message.reasoning:
            if self.reasoning is None:
                raise self._no_place(f"message {number}: ", message.reasoning_key, "reasoning")
            yield _Part(self.reasoning.prefix, counts)
            yield _Part(message.reasoning.strip("\n"), counts, is_content=True)
            yield _Part(self.reasoning.suffix, counts)
            content = content.lstrip("\n")
        if counts and not (content.strip() or calls or message.reasoning.strip()):
            raise ValueError(
                f"message {number}: the {message.role} says nothing, and would be learnt to; write its words, or give "
                "the message a weight of 0"
            )
        yield _Part(content, counts, is_content=True)
        if calls and self.tool_call is None:
            raise self._no_place(
                f"message {number}: ",
                FUNCTION_CALL if message.role == FUNCTION_CALL else message.calls_key,
                "tool_call",
            )
        for at, call in enumerate(calls):
            assert self.tool_call is not None
            yield _Part(("\n" if content or at else "") + self.tool_call.prefix, counts)
            yield _Part(call, counts, is_content=True)
            yield _Part(self.tool_call.suffix, counts)

    def _tools(self, conversation: Conversation) -> Iterator["_Part"]:
        if conversation.tools and self.tools is None:
            raise self._no_place("", conversation.tools_key, "tools")
        if conversation.tools and self.tools is not None:
            yield _Part(self.tools.prefix)
            yield _Part("\n".join(conversation.tools), is_content=True)
            yield _Part(self.tools.suffix)

    def _no_place(self, where: str, key: str, field: str) -> ValueError:
        fix = "give a template file that has" if self.name in BUILT_IN else "give the template"
        passed = "" if key == FUNCTION_CALL else f", or pass the key over with --ignore-key {key}"
        return ValueError(f"{where}{key}: the template {self.name} has no place for it; {fix} `{field}`{passed}")


@dataclass(frozen=True, slots=True)
class _Part:
    """A text of a conversation, whether the loss counts it, and whether it was written by strangers."""

    text: str
    counts: bool = False
    is_content: bool = False


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
_PARTS = ("reasoning", "tool_call", "tools")
# Word for word what the templates of Qwen2.5 and Qwen3 write.
_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TOOLS_BEHIND = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
BUILT_IN = {
    template.name: template
    for template in (
        ChatTemplate(
            "chatml",
            tuple((role, Turn(f"<|im_start|>{role}\n", "<|im_end|>\n")) for role in (*_ROLES, "tool")),
            control_tokens=("<|im_start|>", "<|im_end|>"),
            reasoning=Turn("<think>\n", "\n</think>\n\n"),
            tool_call=Turn("<tool_call>\n", "\n</tool_call>"),
            tools=Turn(_TOOLS_BEFORE, _TOOLS_BEHIND),
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
    `control_tokens`, `start`, `end`, `trim`, and with a prefix and a suffix each `reasoning`, `tool_call` and `tools`.
    Raises UserError where there is none, or the file is malformed.
    """
    if str(name_or_path) in BUILT_IN:
        return BUILT_IN[str(name_or_path)]
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(
            f"chat template {name_or_path}: no built-in template and no file of this name"
            f"{nearest(str(name_or_path), BUILT_IN)}; name a built-in template, or a YAML or JSON file"
        )
    try:
        content = yaml.load(read_text(path), Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"{path}: not YAML or JSON ({' '.join(str(error).split())}); write `roles:` and so on"
        ) from error
    return _TemplateFile(path).read(content)


@dataclass(frozen=True, slots=True)
class _TemplateFile:
    path: Path

    def read(self, content: object) -> ChatTemplate:
        """Return the template of a file's content."""
        fields = self._mapping(content, "", ("roles", "control_tokens", "start", "end", "trim", *_PARTS))
        roles = self._mapping(fields.get("roles"), "roles", None)
        if ASSISTANT not in roles:
            raise self._error("roles", f"has no {ASSISTANT}, whose words are what is learnt; write it")
        names = fields.get("control_tokens", [])
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise self._error("control_tokens", "is no list of tokens; write such as ['<|im_start|>', '<|im_end|>']")
        trim = fields.get("trim", False)
        if not isinstance(trim, bool):
            raise self._error("trim", "is neither true nor false; write one")
        turns = tuple((str(role), self._turn(f"roles.{role}", turn)) for role, turn in roles.items())
        parts = {key: self._turn(key, fields[key]) for key in _PARTS if key in fields}
        start, end = (self._text(fields, key, key) for key in ("start", "end"))
        template = ChatTemplate(str(self.path), turns, tuple(names), start, end, trim, **parts)
        self._check_used(template)
        return template

    def _turn(self, where: str, content: object) -> Turn:
        fields = self._mapping(content, where, ("prefix", "suffix"))
        prefix, suffix = (self._text(fields, key, f"{where}.{key}") for key in ("prefix", "suffix"))
        return Turn(prefix, suffix)

    def _check_used(self, template: ChatTemplate) -> None:
        for name in template.control_tokens:
            if not any(name in text for text in template.texts):
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
            raise self._error(where, f"is {kind(text)}; write a text in quotes")
        return text

    def _error(self, where: str, problem: str) -> UserError:
        return UserError(f"{self.path}: {where} {problem}")
