"""What may lie in a run's folder at a start, and what a start says of what may not."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.errors import UserError
from megalite.files import folder_lock
from megalite.monitoring.run_folder import FILES, FOLDERS, require_run_folder

NOWHERE = r"is a link to nowhere"


def link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize(("make", "found"), [(Path.touch, "is not a folder"), (link, NOWHERE)], ids=["file", "link"])
def test_where_the_run_keeps_a_folder(tmp_path: Path, name: str, make: Callable[[Path], None], found: str) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"^run.dir={tmp_path}: {tmp_path}/{name} {found}.*; "):
        require_run_folder(tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("make", "found"), [(Path.mkdir, "is a folder.*; "), (link, NOWHERE)], ids=["dir", "link"])
def test_where_the_run_keeps_a_file(tmp_path: Path, name: str, make: Callable[[Path], None], found: str) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"^run.dir={tmp_path}: {tmp_path}/{name} {found}"):
        require_run_folder(tmp_path)


def test_links_that_lead_somewhere_are_followed(tmp_path: Path) -> None:
    for name in FOLDERS:
        (tmp_path / "disk" / name).mkdir(parents=True)
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    for name in FILES:
        (tmp_path / "disk" / name).touch()
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    require_run_folder(tmp_path)


@pytest.mark.parametrize(
    ("run", "found"),
    [
        ("link", "link is a link to nowhere"),
        ("link/deeper/run", "link is a link to nowhere"),
        ("loop", "loop is a link to loop"),
        ("file", "file is not a folder; set another run.dir"),
        ("file/run", "file is not a folder; set another run.dir"),
        ("new/deep", None),
        ("to_a_folder", None),
    ],
)
def test_the_runs_folder_itself(tmp_path: Path, run: str, found: str | None) -> None:
    link(tmp_path / "link")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "to_a_folder").symlink_to(tmp_path)
    if found is None:
        require_run_folder(tmp_path / run)
        with folder_lock(tmp_path / run, "run.dir"):
            pass
        return
    with pytest.raises(UserError) as refused:
        require_run_folder(tmp_path / run)
    assert str(refused.value).startswith(f"run.dir={tmp_path}/{run}: {tmp_path}/{found}")
    with pytest.raises(UserError, match=r"^run\.dir: .*; set another folder$"), folder_lock(tmp_path / run, "run.dir"):
        pass


@pytest.mark.parametrize("name", ["", "checkpoints", "metrics.jsonl", ".lock"])
def test_what_this_user_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The superuser may write everywhere: the system's answer is put in its place."""
    for folder in ("checkpoints", "logs"):
        (tmp_path / folder).mkdir()
    for file in ("metrics.jsonl", ".lock"):
        (tmp_path / file).touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / name)
    with pytest.raises(UserError, match=rf"^run.dir={tmp_path}: .*(is not writable|cannot be written); .*run.dir$"):
        require_run_folder(tmp_path)
