"""The links between the pages, as a forge follows them, and the pages of the site's menu."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*/*.md", "benchmarks/results/*.md")
    for path in ROOT.glob(pattern)
)
_LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """Return what a link to a page may have after its ``#``: the headings, spelled as MkDocs and forges do."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for link, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve() if link else page
        if not target.exists():
            yield link
        elif anchor and anchor not in anchors(target):
            yield f"{link}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# One: two\n")
    (tmp_path / "a.md").write_text("[a](b.md#one-two) [b](b.md#three) [c](c.md) [d](https://e.org/f) [e](#here)\n")
    assert list(broken_links(tmp_path / "a.md")) == ["b.md#three", "c.md", "#here"]


def test_the_menu_of_the_site_has_every_page() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    outside = [ROOT / path for path in ("CHANGELOG.md", "CONTRIBUTING.md")]
    pages = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    pages |= {f"repository/{path.relative_to(ROOT)}" for path in (*outside, *ROOT.glob("benchmarks/results/*.md"))}
    assert sorted(_paths(menu)) == sorted(pages)


def _paths(menu: Any) -> Iterator[str]:
    for item in menu if isinstance(menu, list) else menu.values():
        if isinstance(item, str):
            yield item
        else:
            yield from _paths(item)


FILES = [
    path
    for folder in ("megalite", "tests", "tools", "slurm", "configs", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml", ".sh", ".sbatch") and path != Path(__file__)
]


def test_pages_that_code_and_messages_name_are_there() -> None:
    named = {
        (page, str(path.relative_to(ROOT)))
        for path in FILES
        for page in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text(encoding="utf-8"))
    }
    assert ("docs/howto/verify.md", "megalite/verify/table.py") in named
    assert sorted(page for page in named if not (ROOT / page[0]).is_file()) == []
