"""``python tools/reference_pages.py``: write the pages of docs/reference/ that are made from the code anew."""

import json
import sys
from pathlib import Path

from command_line_page import command_line_page
from compatibility_page import composition_page
from deepspeed_json_page import deepspeed_table
from run_file_page import run_file_page

from megalite.config.schema import run_file_schema

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"


def pages() -> dict[Path, str]:
    """Return each page as the code has it, by its path."""
    run_file, command_line = FOLDER / "run_file.md", FOLDER / "command_line.md"
    return {
        run_file: run_file_page(run_file.read_text(encoding="utf-8")),
        command_line: command_line_page(command_line.read_text(encoding="utf-8")),
        FOLDER / "run_file.schema.json": json.dumps(run_file_schema(), indent=2) + "\n",
        FOLDER / "deepspeed_json.md": deepspeed_table(),
        FOLDER / "composition.md": composition_page(),
    }


def main() -> int:
    """Write what differs, and name it."""
    for path, content in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"{path.name}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
