"""Prompts from the command line and from files, each with the place it stands at, for messages."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalite.errors import UserError
from megalite.text_encoding import read_utf8


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue, and where it was found."""

    where: str
    text: str


def read_prompts(texts: Sequence[str], file: Path | None) -> list[Prompt]:
    """Return the given texts, then those of a file; raise UserError where there is none, or the file is malformed."""
    prompts = [Prompt("--prompt" if len(texts) == 1 else f"--prompt {at}", text) for at, text in enumerate(texts, 1)]
    if file is not None:
        prompts += _prompts_of(file)
    for prompt in prompts:
        _require_unicode(prompt)
    if not prompts:
        where = "--prompt" if file is None else str(file)
        raise UserError(f"{where}: nothing to continue; give --prompt TEXT, or --prompts FILE with a prompt a line")
    return prompts


def _require_unicode(prompt: Prompt) -> None:
    """Refuse halves of surrogate pairs, which JSON can spell and a terminal makes of bytes that are no UTF-8."""
    try:
        prompt.text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{prompt.where}: character {error.start} is no Unicode character; give UTF-8") from error


def _prompts_of(file: Path) -> Iterator[Prompt]:
    try:
        lines = read_utf8(file).split("\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; give another --prompts") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is no UTF-8; give --prompts as UTF-8") from error
    for number, line in enumerate(lines, 1):
        where, text = f"{file}: line {number}", line.removesuffix("\r")
        if text.strip():
            yield Prompt(where, _text_in(text, where) if file.suffix == ".jsonl" else text)


def _text_in(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f'{where}: is no JSON ({error}); a line is {{"prompt": "..."}}') from error
    text = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: has no text "prompt"; a line is {{"prompt": "..."}}')
    return text
