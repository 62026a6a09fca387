"""Records of conversations in the forms that public datasets have: messages, instructions, prompts with completions.

Every key of a record and of a message is used, refused, or named in `Conversation.ignored`; a key that holds nothing
(null, an empty text, list or record) needs none of these.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megalite.config.validation import show

ASSISTANT, USER, SYSTEM = "assistant", "user", "system"
FUNCTION_CALL = "function_call"
"""The role of a message that is a call of tools, in JSON."""

_LISTS = ("messages", "conversations")
_QUESTIONS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"))
_SHARE_GPT_ROLES = {"human": USER, "gpt": ASSISTANT}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "train", "training", "loss")
_TOOLS = ("tools", "functions")
_NO_TEXT = ("image", "images", "video", "videos", "audio", "audios")
_TEXT_PARTS = ("text", "input_text", "output_text")


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
        tools_key = next((key for key in _TOOLS if self._holds(record, key)), _TOOLS[0])
        tools = self._tools(record, tools_key)
        self._pass_over(record, {*used, tools_key}, "")
        return Conversation(tuple(messages), tools, tools_key, tuple(self.ignored))

    def _of_record(self, record: Mapping[Any, Any]) -> tuple[list[Message], set[str]]:
        """Return the messages of a record, and the keys in which they stand."""
        asked = any(all(key in record for key in pair) for pair in _QUESTIONS)
        for key in sorted(_LISTS, key=lambda key: record.get(key) is None):
            # A table has every column in every row.
            if key in record and not (asked and record[key] is None):
                messages = self._messages(record[key])
                return self._behind_system(record, messages), {key, "system"}
        for question, answer in _QUESTIONS:
            if question in record and answer in record:
                if question == "instruction":
                    return self._of_instruction(record), {question, "input", answer, "system", "history"}
                asked = [replace(message, counts=False) for message in self._side(record[question], USER, 1)]
                told = self._side(record[answer], ASSISTANT, 1 + len(asked))
                return self._behind_system(record, asked + told), {question, answer, "system"}
        raise ValueError(
            "the record has neither messages nor conversations, nor an instruction and its output, nor a prompt and "
            "its completion"
        )

    def _of_instruction(self, record: Mapping[Any, Any]) -> list[Message]:
        question = [text for key in ("instruction", "input") if (text := record.get(key)) not in (None, "")]
        if not all(isinstance(text, str) for text in question):
            raise ValueError("instruction or input is no text")
        earlier = record.get("history") if self._holds(record, "history") else []
        if not isinstance(earlier, list) or not all(_is_exchange(pair) for pair in earlier):
            raise ValueError("history is no list of pairs of a question and its answer")
        exchanges = [(USER, ASSISTANT, *pair) for pair in earlier]
        turns = [{"role": said[side], "content": said[side + 2]} for said in exchanges for side in (0, 1)]
        turns += [{"role": USER, "content": "\n\n".join(question)}, {"role": ASSISTANT, "content": record["output"]}]
        return self._behind_system(record, self._messages(turns))

    def _behind_system(self, record: Mapping[Any, Any], messages: list[Message]) -> list[Message]:
        """Put what stands under ``system`` before the messages."""
        if not self._holds(record, "system"):
            return messages
        system = Message(SYSTEM, _text("system", record["system"]))
        if messages[0].role != SYSTEM:
            return [system, *messages]
        if messages[0].content != system.content:
            raise ValueError("the record has a system text, and its first message is another; keep one of them")
        return messages

    def _side(self, value: object, role: str, number: int) -> list[Message]:
        """Return a prompt or a completion, which is a text or a list of messages."""
        return self._messages([{"role": role, "content": value}] if isinstance(value, str) else value, number)

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
            raise ValueError(f"{where} has no {role_key}")
        role: str = _text(f"{where}: {role_key}", message[role_key])
        role = _SHARE_GPT_ROLES.get(role, role) if share_gpt else role
        reasoning_key = next((key for key in _REASONING if self._holds(message, key)), "")
        reasoning = _text(f"{where}: {reasoning_key}", message[reasoning_key]) if reasoning_key else ""
        calls_key = next((key for key in ("tool_calls", "function_call") if self._holds(message, key)), "")
        calls = self.calls(where, calls_key, message[calls_key]) if calls_key else ()
        for key in (reasoning_key, calls_key):
            if key and role != ASSISTANT:
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
        if may_lack and message.get(key) is None:
            return ""
        if key not in message:
            raise ValueError(f"{where} has no {key}")
        value = message[key]
        if not isinstance(value, list) or not value or not all(isinstance(part, Mapping) for part in value):
            return _text(f"{where}: {key}", value)
        texts = []
        for number, part in enumerate(value, start=1):
            if part.get("type", "text") not in _TEXT_PARTS:
                found = str(part["type"])[:40]
                raise ValueError(f"{where}: part {number} of {key} is of type {found!r}; parts of type 'text' are read")
            texts.append(_text(f"{where}: text of part {number} of {key}", part.get("text")))
            self._pass_over(part, {"type", "text"}, f"{where}: ", f"{key}.")
        return "".join(texts)

    def _counts(self, where: str, role: str, key: str, value: object) -> bool:
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(f"{where}: {key} is {show(value)}; 0 and 1 are allowed, or false and true")
        if value and role not in (ASSISTANT, FUNCTION_CALL):
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
