"""Expansion of ``~`` and environment variables in paths: one rule for run files, DeepSpeed JSON and command line.

A shell expands only the unquoted words of its command line: a path in a file, or in quotes, arrives as it was typed.
"""

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|\{(?P<braced>[^}]*)\}?|(?P<plain>[A-Za-z_]\w*))", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def expand(text: str) -> str:
    """Return a path with ``$NAME``, ``${NAME}``, ``~`` and ``~user`` replaced, and ``$$`` as ``$``.

    Variables are replaced first, so that ``~`` at the start of a variable's value is expanded as well. A ``$`` before
    any other character stays.

    Raises ValueError for a variable that is not set or is empty, since the path would then begin elsewhere, and for a
    user that the machine does not know. Its text continues a message that begins with the path.
    """
    return _with_home(_VARIABLE.sub(_value, text))


def escape(path: Path | str) -> str:
    """Return the text that `expand` turns back into `path`.

    >>> escape("a$b")
    'a$$b'
    """
    text = str(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


def _value(found: re.Match[str]) -> str:
    if found["escaped"]:
        return "$"
    name = found["plain"] or found["braced"] or ""
    if not _NAME.fullmatch(name) or (found["plain"] is None and not found[0].endswith("}")):
        raise ValueError(f" holds {found[0]}, which is no variable; write ${{NAME}}, or $$ for a dollar sign")
    value = os.environ.get(name)
    if not value:
        state = "is not set" if value is None else "is empty"
        raise ValueError(
            f" needs the variable {name}, which {state} in the environment; set it, write the path in full, or write "
            "$$ for a dollar sign"
        )
    return value


def _with_home(text: str) -> str:
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded == text:
        user = text[1:].partition("/")[0]
        owner = f"the home of {user!r}, a user that this machine does not know" if user else "a home, and there is none"
        raise ValueError(f" asks for {owner}; write ./{text} for a folder of that name")
    return expanded
