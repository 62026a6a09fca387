"""The model family of docs/howto/add_a_model_family.md, as a package in a folder."""

from pathlib import Path

from docs_check import page_files

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "add_a_model_family.md"


def write_package(folder: Path) -> None:
    """Write the modules of the page."""
    for name, content in page_files(PAGE.read_text()).items():
        if name.endswith(".py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
