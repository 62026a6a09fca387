"""Read a text file of settings, with an error that says what is wrong with it."""

from pathlib import Path

from megalite.errors import UserError, did_you_mean
from megalite.text_encoding import read_utf8


def read_text(path: Path) -> str:
    """Return a file's text; raise UserError where it is missing, a folder, unreadable or not UTF-8."""
    try:
        return read_utf8(path)
    except FileNotFoundError:
        folder = path.parent
        siblings = [entry.name for entry in folder.iterdir() if entry.suffix == path.suffix] if folder.is_dir() else []
        raise UserError(f"{path}: no such file{did_you_mean(path.name, siblings)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the file is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read: {error.strerror}") from None
