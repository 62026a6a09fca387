import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalite.files import filesystem_time, folder_lock, partial_path, publish, to_filesystem_time, write_atomically


def test_write_whole_makes_the_folder_and_leaves_nothing_else(tmp_path):
    write_atomically(tmp_path / "new" / "file", b"content")
    assert (tmp_path / "new" / "file").read_bytes() == b"content"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")

    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr("megalite.files.os.replace", no_space)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_publish_replaces(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    partial = partial_path(target)
    partial.write_bytes(b"new")
    publish(partial, target)
    assert target.read_bytes() == b"new"
    assert not partial.exists()


def test_a_folder_has_one_user_at_a_time(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from megalite.files import folder_lock\n" + (
        "with folder_lock(Path(sys.argv[1]), 'run.dir=here'): sys.exit(0)"
    )

    def enter() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
        )

    with folder_lock(tmp_path, "run.dir=here"):
        refused = enter()
    assert f"UserError: run.dir=here is in use by process {os.getpid()} on " in refused.stderr
    assert enter().returncode == 0


@pytest.mark.parametrize(("ahead", "moved"), [(0.0, 0.0), (0.4, 0.0), (-0.4, 0.0), (90.0, 90.0), (-3600.0, -3600.0)])
def test_a_moment_is_told_by_the_clock_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float, moved: float
) -> None:
    """A file server's clock that is ahead of this host's, which is as if this host's were behind."""
    now = time.time()
    monkeypatch.setattr("megalite.files.time.time", lambda: now - ahead)
    assert to_filesystem_time(tmp_path, 500.0) == pytest.approx(500.0 + moved, abs=0.5)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_this_hosts_clock_serves(tmp_path: Path) -> None:
    assert abs(filesystem_time(tmp_path / "missing") - time.time()) < 5
