"""Records of conversations in the forms that public datasets have: messages, or a question with its answer.

Every key of a record and of a message is used, refused, or named in `Conversation.ignored`; a key that holds nothing
(null, an empty text, list or record) needs none of these.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megalite.settings.validation import show

ASSISTANT, USER, SYSTEM = "assistant", "user", "system"
FUNCTION_CALL = "function_call"
"""The role of a message that is a call of tools, in JSON."""

OTHER_ROLES = {
    "human": USER,
    **dict.fromkeys(("gpt", "chatgpt", "ai", "bot", "model"), ASSISTANT),
    "developer": SYSTEM,
    **dict.fromkeys(("observation", "function"), "tool"),
    FUNCTION_CALL: ASSISTANT,
}
"""Roles of public datasets, each with the role that it is where a template does not have it itself."""

_LISTS = ("messages", "conversations")
_INSTRUCTION = "instruction"
_QUESTIONS = (_INSTRUCTION, "prompt", "question", "query", "input")
_ANSWERS = ("output", "completion", "response", "answer")
_BEHIND_INSTRUCTION = ("input", "context")
_CHOSEN, _REJECTED = "chosen", "rejected"
_SYSTEMS = ("system", "system_prompt")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "train", "training", "loss")
_TOOLS = ("tools", "functions")
_NO_TEXT = ("image", "images", "video", "videos", "audio", "audios")
_TEXT_PARTS = ("text", "input_text", "output_text")
_SHOWN_KEYS = 8


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says."""

    role: str
    content: str
    counts: bool = True
    """Whether the loss may count it."""
    reasoning: str = ""
    reasoning_key: str = _REASONING[0]
    """Where the reasoning was found."""
    calls: tuple[str, ...] = ()
    """Calls of tools, each a JSON object of ``name`` and ``arguments``."""
    calls_key: str = "tool_calls"
    """Where the calls were found."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a record, the tools that it offers, each a JSON object, and the keys that were passed over."""

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()
    tools_key: str = _TOOLS[0]
    ignored: tuple[str, ...] = ()


def read_conversation(record: object, ignore: Collection[str] = ()) -> Conversation:
    """Return the conversation of a record, or of a list of messages; keys in `ignore` are passed over.

    Raises ValueError, saying why, for what is malformed and for what no text can say.
    """
    return _Reader(ignore).read(record)


def read_calls(where: str, text: str) -> tuple[str, ...]:
    """Return the calls of tools that a `FUNCTION_CALL` message holds as JSON; raise ValueError where it does not."""
    return _Reader(()).calls(where, FUNCTION_CALL, text)


@dataclass(slots=True)
class _Reader:
    """Reads one record and notes what is passed over."""

    ignore: Collection[str]
    ignored: dict[str, None] = field(default_factory=dict)

    def read(self, record: object) -> Conversation:
        if not isinstance(record, Mapping):
            return Conversation(tuple(self._messages(record)), ignored=tuple(self.ignored))
        messages, used = self._of_record(record)
        system_key = next((key for key in _SYSTEMS if self._holds(record, key)), _SYSTEMS[0])
        messages = self._behind_system(record, system_key, messages)
        tools_key = next((key for key in _TOOLS if self._holds(record, key)), _TOOLS[0])
        tools = self._tools(record, tools_key)
        self._pass_over(record, {*used, system_key, tools_key}, "")
        return Conversation(tuple(messages), tools, tools_key, tuple(self.ignored))

    def _of_record(self, record: Mapping[Any, Any]) -> tuple[list[Message], set[str]]:
        """Return the messages of a record, and the keys in which they stand."""
        lists = self._present(record, _LISTS)
        asked, told = self._present(record, _QUESTIONS), self._present(record, _ANSWERS)
        # A table has every column in every row: null beside a question and its answer says nothing.
        for key in sorted(lists, key=lambda key: record[key] is None):
            if record[key] is not None or not (asked and told):
                return self._messages(record[key]), {key}
        if asked and told:
            return self._of_exchange(record, _question(record, asked), _answer(record, told))
        if self._holds(record, _CHOSEN):
            return self._of_preference(record, asked)
        raise ValueError(_no_conversation(record, asked, told))

    def _of_exchange(self, record: Mapping[Any, Any], question: str, answer: str) -> tuple[list[Message], set[str]]:
        behind = [key for key in _BEHIND_INSTRUCTION if key != question and self._holds(record, key)]
        if behind and question != _INSTRUCTION:
            raise ValueError(
                f"the record has {behind[0]!r} beside {question!r}; it is read behind an {_INSTRUCTION!r}: rename "
                f"{question!r} to that, or pass the key over with --ignore-key {behind[0]}"
            )
        asked = record[question]
        if behind:
            texts = [_text(key, record[key]) for key in (question, *behind)]
            asked = "\n\n".join(filter(None, texts))
        earlier = self._history(record)
        messages = [*earlier, *self._side(question, asked, USER, 1 + len(earlier))]
        messages += self._side(answer, record[answer], ASSISTANT, 1 + len(messages))
        return messages, {question, answer, *behind, "history"}

    def _history(self, record: Mapping[Any, Any]) -> list[Message]:
        earlier = record["history"] if self._holds(record, "history") else []
        if not isinstance(earlier, list) or not all(_is_exchange(pair) for pair in earlier):
            raise ValueError("history is no list of pairs of a question and its answer")
        return [Message(role, text) for pair in earlier for role, text in zip((USER, ASSISTANT), pair, strict=True)]

    def _of_preference(self, record: Mapping[Any, Any], asked: Sequence[str]) -> tuple[list[Message], set[str]]:
        """Return the messages of an answer that was preferred to another, which has to be passed over."""
        if self._holds(record, _REJECTED):
            raise ValueError(
                f"the record has answers under {_CHOSEN!r} and {_REJECTED!r}, and megalite does not train on "
                f"preferences; to learn the chosen ones, pass the others over with --ignore-key {_REJECTED}"
            )
        chosen = record[_CHOSEN]
        if isinstance(chosen, list) and not _opens_with_assistant(chosen):
            return self._messages(chosen), {_CHOSEN}
        if not asked:
            raise ValueError(f"the record has {_CHOSEN!r}, and no question under {_any_of(_QUESTIONS)}")
        return self._of_exchange(record, _question(record, asked), _CHOSEN)

    def _behind_system(self, record: Mapping[Any, Any], key: str, messages: list[Message]) -> list[Message]:
        """Put what stands under ``system`` before the messages."""
        if not self._holds(record, key):
            return messages
        system = Message(SYSTEM, _text(key, record[key]))
        if OTHER_ROLES.get(messages[0].role, messages[0].role) != SYSTEM:
            return [system, *messages]
        if messages[0].content != system.content:
            raise ValueError(f"the record has a text under {key!r}, and its first message is another; keep one of them")
        return messages

    def _side(self, key: str, value: object, role: str, number: int) -> list[Message]:
        """Return a question or an answer, which is a text or a list of messages; of a question none counts."""
        if isinstance(value, str):
            return [Message(role, value)]
        if not isinstance(value, list):
            raise ValueError(f"{key} is neither a text nor a list of messages but {kind(value)}")
        messages = self._messages(value, number)
        return messages if role == ASSISTANT else [replace(message, counts=False) for message in messages]

    def _messages(self, messages: object, first: int = 1) -> list[Message]:
        if not isinstance(messages, list):
            raise ValueError(f"messages are no list but {kind(messages)}")
        if not messages:
            raise ValueError("no messages")
        return [self._message(number, message) for number, message in enumerate(messages, start=first)]

    def _message(self, number: int, message: object) -> Message:
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is no record but {kind(message)}")
        share_gpt = "from" in message and "role" not in message
        role_key, content_key = ("from", "value") if share_gpt else ("role", "content")
        if role_key not in message:
            raise ValueError(f"{where} has no {role_key}, but {_keys_of(message)}; write role and content")
        role = _text(f"{where}: {role_key}", message[role_key])
        reasoning_key = next((key for key in _REASONING if self._holds(message, key)), "")
        reasoning = _text(f"{where}: {reasoning_key}", message[reasoning_key]) if reasoning_key else ""
        calls_key = next((key for key in ("tool_calls", "function_call") if self._holds(message, key)), "")
        calls = self.calls(where, calls_key, message[calls_key]) if calls_key else ()
        for key in (reasoning_key, calls_key):
            if key and (OTHER_ROLES.get(role, role) != ASSISTANT or role == FUNCTION_CALL):
                raise ValueError(f"{where}: {key} stands with {role[:40]!r}; it is the assistant's; remove it")
        weight_key = next((key for key in _WEIGHTS if self._holds(message, key)), "")
        counts = self._counts(where, role, weight_key, message[weight_key]) if weight_key else True
        content = self._content(where, content_key, message, may_lack=bool(calls))
        self._pass_over(message, {role_key, content_key, reasoning_key, calls_key, weight_key}, f"{where}: ")
        return Message(
            role, content, counts, reasoning, reasoning_key or _REASONING[0], calls, calls_key or "tool_calls"
        )

    def _content(self, where: str, key: str, message: Mapping[Any, Any], *, may_lack: bool) -> str:
        """Return a message's text, which may come in parts ``{"type": "text", "text": ...}``."""
        if may_lack and not _is_something(message.get(key)):
            return ""
        if key not in message:
            other = "value" if key == "content" else "content"
            fix = f"rename {other} to {key}" if other in message else f"write {key}"
            raise ValueError(f"{where} has no {key}, but {_keys_of(message)}; {fix}")
        value = message[key]
        if not isinstance(value, list) or not value:
            return _text(f"{where}: {key}", value)
        texts = []
        for number, part in enumerate(value, start=1):
            if not isinstance(part, Mapping):
                raise ValueError(
                    f"{where}: part {number} of {key} is {kind(part)}, and no record "
                    '{"type": "text", "text": ...}; write it so, or all of it as one text'
                )
            if part.get("type", "text") not in _TEXT_PARTS:
                found = str(part["type"])[:40]
                raise ValueError(f"{where}: part {number} of {key} is of type {found!r}; parts of type 'text' are read")
            texts.append(_text(f"{where}: text of part {number} of {key}", part.get("text")))
            self._pass_over(part, {"type", "text"}, f"{where}: ", f"{key}.")
        return "".join(texts)

    def _counts(self, where: str, role: str, key: str, value: object) -> bool:
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(f"{where}: {key} is {show(value)}; 0 and 1 are allowed, or false and true")
        if value and OTHER_ROLES.get(role, role) != ASSISTANT:
            raise ValueError(
                f"{where}: {key} counts words of {role[:40]!r}; the assistant's alone are learnt; remove it, or pass "
                f"it over with --ignore-key {key}"
            )
        return bool(value)

    def calls(self, where: str, key: str, value: object) -> tuple[str, ...]:
        """Return calls of tools, of OpenAI's forms or as a bare ``{"name": ..., "arguments": ...}``, each as JSON."""
        value = _unpacked(f"{where}: {key}", value)
        found = []
        for call in value if isinstance(value, list) else [value]:
            outer = call if isinstance(call, Mapping) else {}
            inner = outer.get("function", outer)
            if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or "arguments" not in inner:
                raise ValueError(f"{where}: {key} is no call of a function with a name and arguments")
            arguments = inner["arguments"]
            if isinstance(arguments, str):
                _unpacked(f"{where}: arguments of {inner['name'][:40]!r}", arguments)
            else:
                arguments = _json(arguments)
            found.append(f'{{"name": {_json(inner["name"])}, "arguments": {arguments}}}')
            if inner is outer:
                self._pass_over(outer, {"name", "arguments", "type"}, where, f"{key}.")
            else:
                self._pass_over(outer, {"function", "type", "index"}, where, f"{key}.")
                self._pass_over(inner, {"name", "arguments"}, where, f"{key}.function.")
        return tuple(found)

    def _tools(self, record: Mapping[Any, Any], key: str) -> tuple[str, ...]:
        if not self._holds(record, key):
            return ()
        tools = _unpacked(key, record[key])
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise ValueError(f"{key} is no list of functions' descriptions")
        return tuple(map(_json, tools))

    def _present(self, record: Mapping[Any, Any], keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key in record and key not in self.ignore]

    def _holds(self, record: Mapping[Any, Any], key: str) -> bool:
        """Tell whether there is something under a key that is not to be passed over."""
        return _is_something(record.get(key)) and key not in self.ignore

    def _pass_over(self, record: Mapping[Any, Any], used: Iterable[str], where: str, prefix: str = "") -> None:
        """Note the keys that are not used; raise ValueError for what belongs to the words and cannot be written."""
        for key, value in record.items():
            if not _is_something(value) or (key in used and key not in self.ignore):
                continue
            if key in _NO_TEXT and key not in self.ignore:
                raise ValueError(
                    f"{where}key {key!r} holds what no text says; leave the record out, or pass the key over with "
                    f"--ignore-key {key}"
                )
            self.ignored[f"{prefix}{key}"] = None


def _question(record: Mapping[Any, Any], asked: Sequence[str]) -> str:
    """Return which of the keys holds the question."""
    return next((key for key in asked if _is_something(record[key])), asked[0])


def _answer(record: Mapping[Any, Any], told: Sequence[str]) -> str:
    """Return which of the keys holds the answer; raise ValueError where several do."""
    given = [key for key in told if _is_something(record[key])]
    if len(given) > 1:
        raise ValueError(
            f"the record has answers under {' and '.join(map(repr, given))}; only one can be learnt: pass the other "
            f"over with --ignore-key {given[-1]}"
        )
    return given[0] if given else told[0]


def _no_conversation(record: Mapping[Any, Any], asked: Sequence[str], told: Sequence[str]) -> str:
    """Say why a record is no conversation, by the keys that it has, and what would be one."""
    if "role" in record or "from" in record:
        return "the record is a single message; a record holds a whole conversation, as a list under 'messages'"
    lists = [key for key, value in record.items() if isinstance(value, list) and any(map(_is_message, value))]
    if lists:
        return f"the record has messages under {lists[0]!r}; name the key with --text-key {lists[0]}"
    if asked:
        return f"the record has {asked[0]!r}, and no answer to it under {_any_of(_ANSWERS)}, but {_keys_of(record)}"
    if told:
        return f"the record has {told[0]!r}, and no question to it under {_any_of(_QUESTIONS)}, but {_keys_of(record)}"
    plain = "; for plain text leave --chat out" if isinstance(record.get("text"), str) else ""
    return (
        f"the record has neither messages under {_any_of(_LISTS)}, nor a question ({_any_of(_QUESTIONS)}) with its "
        f"answer ({_any_of(_ANSWERS)}), but {_keys_of(record)}; --text-key names another key of messages{plain}"
    )


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _opens_with_assistant(messages: Sequence[object]) -> bool:
    first = messages[0]
    role = first.get("role", first.get("from")) if isinstance(first, Mapping) else None
    return isinstance(role, str) and OTHER_ROLES.get(role, role) == ASSISTANT


def _any_of(keys: Sequence[str]) -> str:
    return f"{', '.join(keys[:-1])} or {keys[-1]}"


def _keys_of(record: Mapping[Any, Any]) -> str:
    """Return the first keys of a record in words."""
    if not record:
        return "no key at all"
    shown = ", ".join(repr(str(key)[:40]) for key in list(record)[:_SHOWN_KEYS])
    more = f" and {len(record) - _SHOWN_KEYS} more" if len(record) > _SHOWN_KEYS else ""
    return f"{'the key' if len(record) == 1 else 'the keys'} {shown}{more}"


def _is_exchange(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _is_something(value: object) -> bool:
    return value is not None and value != "" and value != [] and value != {}


def _text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is no text but {kind(value)}")
    return value


def _unpacked(what: str, value: object) -> object:
    """Return what a text of JSON says, and anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({error})") from error


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _json(value: object) -> str:
    # As transformers writes JSON in chat templates.
    return json.dumps(value, ensure_ascii=False)


def kind(value: object) -> str:
    """Return what a value of JSON is, in words."""
    kinds = {dict: "a record", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
