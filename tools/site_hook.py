"""MkDocs's hook: pages of the repository outside docs/ become pages of the site, and links between both are followed.

A link is written as a forge shows it, relative to the file that it stands in: ``../benchmarks/results/data.md``. In
the site that file is ``repository/benchmarks/results/data.md``.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[1]
INCLUDED = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/*.md")
"""Patterns of the pages outside docs/ that the site has."""
PREFIX = "repository/"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(?=[)#])")


def on_files(files: "Files", *, config: Any) -> "Files":
    """Add the pages outside docs/ to the site."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    for path in _included():
        files.append(File.generated(config, PREFIX + path, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrite links that lead into docs/ or out of it."""
    here = _in_repository(page.file.src_uri)
    return _LINK.sub(lambda match: _in_site(match[1], here, page.file.src_uri), markdown)


def _included() -> Iterator[str]:
    for pattern in INCLUDED:
        yield from sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def _in_repository(src_uri: str) -> str:
    """Return where a page of the site lies in the repository."""
    return src_uri.removeprefix(PREFIX) if src_uri.startswith(PREFIX) else f"docs/{src_uri}"


def _in_site(link: str, here: str, src_uri: str) -> str:
    """Return a link of the repository's file `here` as the site's page `src_uri` needs it."""
    target = os.path.normpath(os.path.join(os.path.dirname(here), link))
    in_site = target.removeprefix("docs/") if target.startswith("docs/") else PREFIX + target
    return os.path.relpath(in_site, os.path.dirname(src_uri))
