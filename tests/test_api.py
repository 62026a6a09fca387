"""Training from Python: in this process, in ranks that are started, and what is refused. The scripts are processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ON_CPU, TINY

PREAMBLE = """
import megalite, sys
from pathlib import Path

class Seen(megalite.Callback):
    def __init__(self): self.calls = []
    def on_start(self, start): self.calls.append(f"start {start.step}")
    def before_step(self, step): self.calls.append(f"before {step}")
    def after_step(self, report): self.calls.append(f"after {report.step}")
    def on_checkpoint(self, report): self.calls.append(f"checkpoint {report.step}")
    def on_end(self, end): self.calls.append(f"end {end.step}")
    def close(self): self.calls.append("close")
"""
PLUGIN = """
import megalite

@megalite.register_callback("teller")
class Teller(megalite.Callback):
    def on_end(self, end):
        if end.complete: open(f"told_{self.rank}", "w").write(str(end.step))
    def on_start(self, start): self.rank = start.mesh.rank
"""


def script(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        cwd=folder,
        env={**ON_CPU, "PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def content(run_file: Path) -> dict[str, object]:
    return yaml.safe_load(run_file.read_text())


def test_a_run_of_one_rank_calls_objects_of_this_process_and_can_be_followed_by_another(
    run_file: Path, content: dict[str, object], tmp_path: Path
) -> None:
    code = f"""
small = {[*TINY, "train.steps=3"]}
seen = Seen()
first = megalite.train("run.yaml", [*small, "train.stop_after=2"], callbacks=[seen])
assert (first.step, first.complete, first.stopped_by) == (2, False, "train.stop_after=2"), first
assert seen.calls == ["start 0", "before 1", "after 1", "before 2", "after 2", "checkpoint 2", "end 2", "close"]
second = megalite.train({content}, small, callbacks=[again := Seen()])
assert (second.step, second.complete, second.stopped_by) == (3, True, None), second
assert again.calls[0] == "start 2" and "after 3" in again.calls, again.calls
assert second.folder == Path({str(tmp_path / "run")!r})
import os
assert "RANK" not in os.environ
loaded = megalite.load_run_config(Path("run.yaml"), [*small, "resume=never", "train.steps=1"])
assert megalite.train(loaded).step == 1
class Fails(megalite.Callback):
    def after_step(self, report): raise megalite.UserError("the callback's own words")
try:
    megalite.train(loaded, callbacks=[Fails()])
except megalite.UserError as error:
    assert str(error) == "the callback's own words"
else:
    raise AssertionError("no error")
"""
    script(code, tmp_path)


def test_several_ranks_are_started_and_refuse_objects_of_this_process(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "teller.py").write_text(PLUGIN)
    code = f"""
two = {[*TINY, "train.steps=2", "parallel.data=2", "plugins=[teller]", "train.callbacks=[teller]"]}
try:
    megalite.train("run.yaml", two, callbacks=[Seen()])
except megalite.UserError as error:
    assert "callbacks: 2 ranks are started in processes of their own" in str(error), error
    assert "torchrun --nproc_per_node 2 SCRIPT.py" in str(error), error
else:
    raise AssertionError("no error")
assert megalite.train("run.yaml", two).complete
assert megalite.train("run.yaml", two).step == 2  # nothing is left
try:
    megalite.train("run.yaml", [*two, "train.steps=3", "data.tokenizer=absent"])
except megalite.UserError as error:
    assert "data.tokenizer=absent" in str(error), error
"""
    script(code, tmp_path)
    assert [(tmp_path / f"told_{rank}").read_text() for rank in range(2)] == ["2", "2"]


def test_the_package_has_its_public_names() -> None:
    import megalite

    assert all(getattr(megalite, name) is not None for name in megalite.__all__)
    assert set(megalite.__all__) <= set(dir(megalite))
    with pytest.raises(AttributeError, match="module 'megalite' has no attribute 'trian'"):
        _ = megalite.trian  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, megalite; print(sorted({'torch', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
