"""The commands of the pages: which are found on a page, which are left out, and that they do what the page says."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "docs_check.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_check", TOOL)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["docs_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["docs_check"])
    return sys.modules["docs_check"]


@pytest.mark.parametrize(
    ("block", "found"),
    [
        pytest.param(
            "```\nmegalite a\nmegalite b   # what it is for\n```",
            [(2, "megalite a"), (3, "megalite b")],
            id="a line each",
        ),
        pytest.param(
            "```sh\nmegalite a \\\n    --b c\nmake d\n```",
            [(2, "megalite a --b c"), (4, "make d")],
            id="over two lines",
        ),
        pytest.param(
            "```\n$ megalite a\nmegalite: said\n\n$ ls b\n```", [(2, "megalite a"), (5, "ls b")], id="with prompts"
        ),
        pytest.param("```\n$ unheard-of a\n```", [(2, "unheard-of a")], id="a prompt before any program"),
        pytest.param("```\nnode0 slots=8\nmegalites are stones\n```", [], id="no command"),
        pytest.param("```\ntext ── ►\nmegalite a\n```", [], id="a drawing"),
        pytest.param("```yaml\nmegalite a\n```", [], id="another language"),
        pytest.param("megalite a\n", [], id="no block"),
        pytest.param(
            "```\nmegalite a --text '#1'\n```", [(2, "megalite a --text '#1'")], id="a sign that begins no comment"
        ),
    ],
)
def test_the_commands_of_a_page_are_found(tool: ModuleType, block: str, found: list[tuple[int, str]]) -> None:
    assert [(command.line, command.text) for command in tool.commands("page", block)] == found


def test_a_python_block_is_a_script_that_its_first_line_names(tool: ModuleType) -> None:
    (script,) = tool.commands("page", "```python\nimport this\n\nprint(this)\n```")
    assert (script.text, script.script) == ("Python: import this", "import this\n\nprint(this)")


def test_files_are_the_blocks_that_begin_with_a_name(tool: ModuleType) -> None:
    named, unnamed = "```yaml\n# tune.yaml\nrun: {dir: a}\n```\n", "```yaml\nrun: {dir: b}\n```\n"
    module = "```python\n# mine/layers.py\nimport this\n```\n"
    assert tool.page_files(named + unnamed + module) == {
        "tune.yaml": "# tune.yaml\nrun: {dir: a}",
        "mine/layers.py": "# mine/layers.py\nimport this",
    }
    assert tool.commands("page", module) == []


def test_what_a_page_shows_says_how_a_command_ends(tool: ModuleType) -> None:
    text = "```\n$ megalite a\nmegalite: error: b\n...\n$ megalite c\n3 steps in 2 s\n```"
    wrong, right = tool.commands("page", text)
    assert (wrong.status, wrong.shown) == (2, ("megalite: error: b",))
    assert (right.status, right.shown) == (0, ("3 steps in 2 s",))
    assert tool.unsaid(right, "14 steps in 9 s\n") == []
    assert tool.unsaid(right, "14 stairs in 9 s\n") == ["3 steps in 2 s"]


def test_every_page_with_commands_has_its_place_and_what_is_left_out_is_there(tool: ModuleType) -> None:
    assert tool.faults() == []
    assert sum(len(tool.of_page(page.path)) for page in tool.PAGES) > 50


@pytest.mark.parametrize("path", ["docs/howto/verify.md", "README.md"])
def test_an_entry_that_no_page_has_is_an_error(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setitem(tool.LEFT_OUT, path, tool.LEFT_OUT[path] | {"megalite never": "it never was"})
    assert tool.faults() == [f"{path}: LEFT_OUT names 'megalite never', which is not there"]


def test_a_page_without_a_place_is_an_error(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "PAGES", tuple(page for page in tool.PAGES if page.path != "docs/howto/doctor.md"))
    monkeypatch.delitem(tool.LEFT_OUT, "docs/howto/doctor.md")
    assert tool.faults() == ["docs/howto/doctor.md: has commands and is not in PAGES"]


def test_a_page_builds_upon_an_earlier_one(tool: ModuleType) -> None:
    paths = [page.path for page in tool.PAGES]
    assert all(page.after is None or paths.index(page.after) < at for at, page in enumerate(tool.PAGES))


@pytest.mark.processes
def test_a_script_and_a_run_file_of_a_page_are_run_in_its_folder(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = "```yaml\n# a.yaml\nmodel: {hidden_size: 4096}\ndata: {sequence_length: 4096}\n```\n"
    script = "```python\nimport yaml\n\nassert yaml.safe_load(open('a.yaml'))['model']['hidden_size'] == 64\n```\n"
    (tmp_path / "page.md").write_text(run_file + script + "```python\nraise SystemExit(3)\n```\n")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert tool.check(tool.Page("page.md"), tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "page.md:" in line] == ["ok", "WRONG"]


@pytest.mark.processes
def test_a_command_that_ends_otherwise_than_its_page_says_is_told(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = "```\n$ echo 3 steps\n5 steps\n$ false\n$ cat nowhere\nmegalite: error: nowhere\n$ sleep 5\n```"
    monkeypatch.setattr(tool, "of_page", lambda path: tool.commands(path, page))
    monkeypatch.setattr(tool, "SECONDS", 0.5)
    monkeypatch.setitem(tool.LEFT_OUT, "page", {})
    monkeypatch.setattr(tool, "page_files", lambda text: {})
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    (tmp_path / "page").touch()
    assert tool.check(tool.Page("page"), tmp_path) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "page:" in line] == ["ok", "WRONG", "WRONG", "WRONG"]
    assert sum("it had not ended after 0.5 s" in line for line in lines) == 1


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_every_command_does_what_its_page_says(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([]) == 0, capsys.readouterr().out
