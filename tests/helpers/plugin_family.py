"""The model family of docs/howto/add_a_model_family.md, as a package in a folder."""

from pathlib import Path

from docs_check import blocks

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "add_a_model_family.md"


def write_package(folder: Path) -> None:
    """Write the modules of the page, each of which has its path in its first line."""
    for _, language, lines in blocks(PAGE.read_text()):
        if language == "python":
            file = folder / lines[0].removeprefix("# ")
            file.parent.mkdir(exist_ok=True)
            file.write_text("\n".join(lines))
