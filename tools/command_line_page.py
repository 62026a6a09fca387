"""The tables of docs/reference/command_line.md: verbs, arguments and options come from the parsers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from megalite.cli import build_app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "command_line.md"
_VERBS = re.compile(r"(?<=<!-- verbs -->\n\n).*?(?=\n<!-- end -->\n)", re.DOTALL)


def command_line_page(page: str) -> str:
    """Return the page with the verbs as the parsers have them.

    Raises ValueError where the page has no place for them.
    """
    if not _VERBS.search(page):
        raise ValueError("the page has no <!-- verbs --> with an <!-- end -->")
    return _VERBS.sub(lambda _: "\n".join(_verbs(typer.main.get_command(build_app()), "megalite")), page)


def _verbs(group: Any, path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _verbs(command, f"{path} {name}")
        else:
            yield _verb(command, f"{path} {name}")


def _verb(command: Any, path: str) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [
        parameter for parameter in command.params if parameter.param_type_name == "option" and not parameter.hidden
    ]
    usage = " ".join([path, *(["[OPTIONS]"] if options else []), *map(_usage, arguments)])
    return f"### {path}\n\n```text\n{usage}\n```\n\n{_paragraphs(command.help or '')}{_table(arguments, options)}"


def _paragraphs(text: str) -> str:
    """Return a help text in Markdown: a paragraph that is a command becomes a block."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    starts = ("deepspeed --", "torchrun --", "srun --")
    return "".join(f"```text\n{line}\n```\n\n" if line.startswith(starts) else f"{line}\n\n" for line in paragraphs)


def _usage(argument: Any) -> str:
    name = f"{_name(argument)}..." if argument.nargs == -1 else _name(argument)
    return name if argument.required else f"[{name}]"


def _table(arguments: list[Any], options: list[Any]) -> str:
    rows = [(f"`{_name(argument)}`", argument) for argument in arguments]
    rows += [(_spelled(option), option) for option in options]
    lines = "".join(f"| {name} | {_default(parameter)} | {_cell(parameter.help or '')} |\n" for name, parameter in rows)
    return f"| argument or option | default | meaning |\n| --- | --- | --- |\n{lines}"


def _name(argument: Any) -> str:
    return (argument.metavar or argument.name.upper()).strip("[]")


def _spelled(option: Any) -> str:
    spelled = ", ".join(f"`{spelling}`" for spelling in option.opts)
    if option.is_flag or getattr(option, "count", False):
        return spelled
    value = option.metavar or option.name.upper().replace("_", "-")
    return spelled[:-1] + f" {_cell(value)}`"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    return f"`{value}`" if plain and value != "" else ""


def _cell(text: str) -> str:
    """Return a text that a cell of a table can hold."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
