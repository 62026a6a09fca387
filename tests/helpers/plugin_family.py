"""The model family of docs/howto/add_a_model_family.md: its package in a folder, and its end in the registry."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from docs_check import page_files

from megalite.model.registry import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "add_a_model_family.md"
NAME = "starcoder2"


@contextmanager
def plugin_family(folder: Path) -> Iterator[None]:
    """Work in a folder that has the page's package; afterwards forget the families that were registered."""
    for name, content in page_files(PAGE.read_text()).items():
        if name.endswith(".py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
    here = Path.cwd()
    os.chdir(folder)
    try:
        with (
            patch.object(FAMILIES, "_values", dict(FAMILIES)),
            patch.object(FAMILIES, "_sources", dict(FAMILIES._sources)),  # pyright: ignore[reportPrivateUsage]
            patch.object(sys, "path", [str(folder), *sys.path]),
        ):
            yield
    finally:
        os.chdir(here)
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]
