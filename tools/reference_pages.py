"""``python tools/reference_pages.py``: write the pages of docs/reference/ that are made from the code anew."""

import sys
from pathlib import Path

from command_line_page import command_line_page
from compatibility_page import composition_page
from deepspeed_json_page import deepspeed_table
from run_file_page import run_file_page

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"


def pages() -> dict[Path, str]:
    """Return each page as the code has it, by its path."""
    run_file, command_line = FOLDER / "run_file.md", FOLDER / "command_line.md"
    return {
        run_file: run_file_page(run_file.read_text(encoding="utf-8")),
        command_line: command_line_page(command_line.read_text(encoding="utf-8")),
        FOLDER / "deepspeed_json.md": deepspeed_table(),
        FOLDER / "composition.md": composition_page(),
    }


def main() -> int:
    """Write what differs, and name it."""
    for path, content in pages().items():
        if path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"{path.name}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
