"""Text that fits a line of the console."""

import shutil


def one_line(text: str, width: int) -> str:
    """Return a text on one line, of at most `width` characters, or 40 where that is less."""
    flat = " ".join(text.split())
    room = max(40, width)
    return flat if len(flat) <= room else f"{flat[: room - 3]}..."


def console_width() -> int:
    """Return the console's columns, 160 where it is none."""
    return shutil.get_terminal_size((160, 24)).columns
