"""A corpus of real English without a network: what Python's own standard library says about itself.

Every CPython ships some three megabytes of prose under the PSF licence: the docstrings of its modules, classes and
functions, the language reference behind ``help("keyword")`` (`pydoc_data.topics`), and the longer comments. They are
read from the source files as text; nothing is imported or run.

    python examples/quickstart/build_corpus.py --output data/quickstart/corpus.jsonl

writes one ``{"text": ...}`` a line. The same Python gives the same file.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SHORTEST_DOCSTRING = 40
SHORTEST_COMMENT = 80
LEAST_PROSE = 0.6


def main() -> None:
    """Write the corpus and say how much it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    texts = corpus(Path(sysconfig.get_path("stdlib")))
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    partial.replace(output)
    size = sum(len(text.encode()) for text in texts)
    print(f"{output}: {len(texts):,} documents, {size / 1e6:.2f} MB of text from Python's standard library")


def corpus(library: Path) -> list[str]:
    """Return every text of a library once.

    Ordered by hash rather than by file: training and validation are split by position, and are to be alike.
    """
    texts = {text for path in source_files(library) for text in texts_of(path)}
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def source_files(library: Path) -> Iterator[Path]:
    """Yield the library's Python files, without its tests and without what was installed beside it."""
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = set(subfolders) - SKIPPED_FOLDERS
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def texts_of(path: Path) -> Iterator[str]:
    """Yield the prose of one source file; none where the file is not valid Python."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    yield from docstrings(tree)
    yield from comments(source)
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        yield from topics(tree)


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= SHORTEST_DOCSTRING and is_text(text):
                yield text


def topics(tree: ast.Module) -> Iterator[str]:
    """Yield the chapters of the language reference: the values of the one dictionary in `pydoc_data.topics`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            values = [value.value for value in node.values if isinstance(value, ast.Constant)]
            yield from (value.strip() for value in values if isinstance(value, str))


def comments(source: str) -> Iterator[str]:
    """Yield comments that stand on lines of their own, each block as one text, where they are prose and not code."""
    for block in re.findall(r"(?:^[ \t]*#.*\n)+", source, flags=re.MULTILINE):
        yield from prose([re.sub(r"^\s*#+:? ?", "", line) for line in block.splitlines()])


def prose(block: list[str]) -> Iterator[str]:
    """Yield a comment as one text if most of its letters stand in plain lower-case words."""
    text = "\n".join(block).strip()
    letters = len(re.sub(r"\s", "", text))
    words = sum(map(len, re.findall(r"\b[a-z]{2,}\b", text)))
    if len(text) >= SHORTEST_COMMENT and words >= LEAST_PROSE * letters:
        yield text


def is_text(text: str) -> bool:
    """Tell whether a string can be written as UTF-8: source code may hold lone surrogates."""
    return not re.search("[\ud800-\udfff]", text)


if __name__ == "__main__":
    main()
