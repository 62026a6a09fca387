"""The key `plugins`: modules that are imported before the rest of the run file is read."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.config import load_run_config
from megalite.config.plugins import plugin_code
from megalite.errors import UserError
from megalite.launch.consistency import code_digests
from megalite.registry import Registry

RUN: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {
        "architecture": "gpt2",
        "vocab_size": 64,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 8,
    },
    "data": {"sequence_length": 8, "train": [{"prefix": "corpus"}]},
    "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a run file and modules into the working directory, as a start with the command `megalite` finds them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def write_run(plugins: object, **modules: str) -> Path:
        for name, code in modules.items():
            (tmp_path / f"{name}.py").write_text(code)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN | {"plugins": plugins}))
        return Path("run.yaml")

    return write_run


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load_run_config(path, overrides)
    return str(raised.value)


def test_modules_of_the_working_directory_are_imported_in_their_order(write: Callable[..., Path]) -> None:
    seen = "import sys; SEEN = sys.modules.setdefault('seen_by_plugins', []); SEEN.append(__name__)"
    config = load_run_config(write(["plugin_b", "plugin_a"], plugin_a=seen, plugin_b=seen))
    assert sys.modules["seen_by_plugins"] == ["plugin_b", "plugin_a"]
    assert config.plugins == ("plugin_b", "plugin_a")


def test_the_resolved_run_file_names_the_plugins(write: Callable[..., Path]) -> None:
    path = write(["plugin_c"], plugin_c="")
    path.write_text(load_run_config(path).resolve(world_size=1, vocab_size=None).to_yaml())
    assert load_run_config(path).plugins == ("plugin_c",)
    path = write([])
    assert "plugins" not in load_run_config(path).to_yaml()


def test_the_command_line_names_plugins_too(write: Callable[..., Path]) -> None:
    assert load_run_config(write([], plugin_d=""), ["plugins=[plugin_d]"]).plugins == ("plugin_d",)
    assert "plugin_d" in sys.modules


@pytest.mark.parametrize(
    ("plugins", "words"),
    [
        (
            ["my_packag"],
            "plugins.0='my_packag' is neither installed nor in the working directory {here}; did you mean ",
        ),
        (
            ["zzz"],
            "plugins.0='zzz' is neither installed nor in the working directory {here}; install it, or start from",
        ),
        (["my_package.absent"], "plugins.0='my_package.absent' is neither installed nor in the working directory"),
        (["my_package.py"], "plugins.0='my_package.py' is the name of a file; write the module's name, 'my_package'"),
        ("my_package", "plugins='my_package' is not a list; write [my_package]"),
        ([1], "plugins=[1] is not a list of names of Python modules, such as [my_package]"),
        (["./my_package"], "plugins=['./my_package'] is not a list of names of Python modules, such as [my_package]"),
    ],
)
def test_a_missing_plugin_is_named_with_the_fix(
    plugins: object, words: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    found = refusal(write(plugins, my_package=""))
    assert found.startswith("run.yaml: " + words.format(here=tmp_path))
    assert len(found.splitlines()) == 1


def test_what_a_plugin_raises_is_shown_with_its_line(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(["plugin_e", "plugin_f"], plugin_e="\nraise KeyError('rate')", plugin_f="import not_installed")
    assert refusal(path).splitlines() == [
        f"run.yaml: plugins.0='plugin_e' cannot be imported: KeyError: 'rate' ({tmp_path}/plugin_e.py, line 2); "
        "`python -c 'import plugin_e'` shows the whole traceback",
        "run.yaml: plugins.1='plugin_f' cannot be imported: ModuleNotFoundError: No module named 'not_installed' "
        f"({tmp_path}/plugin_f.py, line 1); `python -c 'import plugin_f'` shows the whole traceback",
    ]
    assert refusal(path, "plugins=[plugin_e]").startswith("command line: plugins.0='plugin_e' cannot be imported")


def test_the_code_of_a_plugin_is_a_file_or_a_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "folder_plugin").mkdir()
    (tmp_path / "folder_plugin" / "__init__.py").write_text("")
    load_run_config(write(["plugin_g", "folder_plugin"], plugin_g="A = 1"))
    assert plugin_code("plugin_g") == tmp_path / "plugin_g.py"
    assert plugin_code("folder_plugin") == tmp_path / "folder_plugin"
    assert list(code_digests(plugin_code("plugin_g"))) == ["plugin_g.py (SHA-256)"]
    assert list(code_digests(plugin_code("folder_plugin"))) == ["folder_plugin/__init__.py (SHA-256)"]


def test_a_name_is_registered_once() -> None:
    losses: Registry[object] = Registry("loss")

    @losses.register("mine")
    def first() -> None: ...

    losses.register("mine")(first)
    with pytest.raises(ValueError, match="the loss 'mine' is registered already, by .*test_plugins.py"):

        @losses.register("mine")
        def second() -> None: ...

    assert dict(losses) == {"mine": first}
