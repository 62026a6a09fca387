import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart" / "build_corpus.py"
DOCSTRING = "A docstring that is long enough to be taken into the corpus."
COMMENT = "a comment of several lines that explains at some length\nwhy the code below is as it is and not another way"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("build_corpus", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def library(folder: Path, **sources: str) -> Path:
    for name, source in sources.items():
        path = folder / (name.replace("__in__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def test_docstrings_and_comments_are_taken_once(example, tmp_path):
    source = f'''"""{DOCSTRING}"""
class A:
    """{DOCSTRING}

    More of it."""
    async def f(self):
        """Short."""

    # {COMMENT.splitlines()[0]}
    # {COMMENT.splitlines()[1]}
    x = 1  # a remark behind code is left out, however long and well written it may happen to be, always
# A1 = f2(B3[4:5], C6) + G7(H8 ** 9) - (I10 << 11) % J12 + {{K13: L14, M15: N16}}[O17] or P18(Q19, *R20)
raise SystemExit("nothing is run")
'''
    texts = example.corpus(library(tmp_path, a=source, b=source, broken="def ("))
    assert sorted(texts) == sorted([DOCSTRING, f"{DOCSTRING}\n\nMore of it.", COMMENT])


def test_the_language_reference_is_taken(example, tmp_path):
    texts = example.corpus(library(tmp_path, pydoc_data__in__topics="topics = {'if': '  The if statement.\\n'}"))
    assert texts == ["The if statement."]


@pytest.mark.parametrize("folder", ["site-packages", "test", "idle_test"])
def test_what_is_not_the_library_is_left_out(example, tmp_path, folder):
    library(tmp_path / folder, a=f'"""{DOCSTRING}"""')
    assert example.corpus(tmp_path) == []


def test_text_that_utf8_cannot_write_is_left_out(example, tmp_path):
    library(tmp_path, a=f'"""{DOCSTRING} \\ud800"""', b=f'"""{DOCSTRING}"""')
    assert example.corpus(tmp_path) == [DOCSTRING]


def test_this_python_gives_megabytes(tmp_path):
    output = tmp_path / "new" / "corpus.jsonl"
    done = subprocess.run([sys.executable, EXAMPLE, "--output", output], capture_output=True, text=True, check=True)
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    size = sum(len(text.encode()) for text in texts)
    assert done.stdout.startswith(f"{output}: {len(texts):,} documents, {size / 1e6:.2f} MB")
    assert size > 1_500_000
    assert len(set(texts)) == len(texts)
    assert list(output.parent.iterdir()) == [output]
