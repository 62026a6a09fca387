"""The pages of docs/reference/ that are made from the code, and the links of the site."""

import importlib
import re

import pytest
from command_line_page import command_line_page
from reference_pages import FOLDER
from run_file_page import keys_without_meaning, run_file_page
from site_hook import _in_site

HINT = "make it anew: make docs-pages"
RUN_FILE = FOLDER / "run_file.md"
COMMAND_LINE = FOLDER / "command_line.md"


def test_the_run_files_page_has_the_keys_of_the_code() -> None:
    page = RUN_FILE.read_text(encoding="utf-8")
    assert run_file_page(page) == page, HINT


def test_every_key_of_the_run_files_page_has_a_meaning_and_a_default() -> None:
    assert keys_without_meaning(RUN_FILE.read_text(encoding="utf-8")) == []


def test_a_key_that_the_page_lacks_gets_a_row_without_a_meaning_and_a_key_that_is_gone_loses_its_row() -> None:
    page = RUN_FILE.read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `train.steps`"))
    made = run_file_page(page.replace(row, "| `train.epochs` | required | a number | Passes over the data. |"))
    assert "train.epochs" not in made
    assert keys_without_meaning(made) == ["`train.steps`"]


def test_a_default_and_the_allowed_values_come_from_the_code() -> None:
    page = RUN_FILE.read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `train.log_every`"))
    wrong = row.replace("`1`", "`7`").replace("an integer of at least 1", "a colour")
    assert wrong != row
    assert run_file_page(page.replace(row, wrong)) == page


def test_a_table_that_the_page_lacks_is_an_error() -> None:
    page = RUN_FILE.read_text(encoding="utf-8").replace("<!-- keys: checkpoint -->", "")
    with pytest.raises(ValueError, match="'checkpoint'"):
        run_file_page(page)


def test_the_command_lines_page_has_the_verbs_of_the_parsers() -> None:
    page = COMMAND_LINE.read_text(encoding="utf-8")
    assert command_line_page(page) == page, HINT
    verbs = re.findall(r"^### (megalite .+)$", page, re.MULTILINE)
    assert {"megalite train", "megalite tokenizer train", "megalite slurm"} <= set(verbs)
    assert "| `--dry-run` |" in page
    assert "--report-into" not in page, "an option that is hidden"


def test_the_python_apis_page_names_what_there_is() -> None:
    names = re.findall(r"^::: (\S+)$", (FOLDER / "python_api.md").read_text(encoding="utf-8"), re.MULTILINE)
    modules = {name: importlib.import_module(name.rpartition(".")[0]) for name in names}
    assert len(names) > 10
    assert [name for name, module in modules.items() if not hasattr(module, name.rpartition(".")[2])] == []


@pytest.mark.parametrize(
    ("link", "here", "page", "found"),
    [
        pytest.param(
            "../concepts/a.md", "docs/howto/verify.md", "howto/verify.md", "../concepts/a.md", id="within docs"
        ),
        pytest.param(
            "../../benchmarks/results/data.md",
            "docs/howto/verify.md",
            "howto/verify.md",
            "../repository/benchmarks/results/data.md",
            id="out of docs",
        ),
        pytest.param(
            "docs/howto/verify.md",
            "CONTRIBUTING.md",
            "repository/CONTRIBUTING.md",
            "../howto/verify.md",
            id="into docs",
        ),
        pytest.param(
            "a.md", "benchmarks/results/b.md", "repository/benchmarks/results/b.md", "a.md", id="outside docs"
        ),
    ],
)
def test_a_link_of_the_repository_leads_to_the_same_page_in_the_site(
    link: str, here: str, page: str, found: str
) -> None:
    assert _in_site(link, here, page) == found
