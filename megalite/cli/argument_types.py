"""Words of the command line that say more than their type."""

from pathlib import Path

from megalite.errors import UserError


def file_name(word: str) -> Path:
    """Return the path of a file to write; raise UserError where a word names a folder by the slash at its end."""
    if word.endswith("/"):
        raise UserError(f"--output={word}: names a folder; write a name in it, such as {word}corpus")
    return Path(word)
