"""The command line: what it prints and the status it ends with. The verbs' own work is tested beside the library."""

import math
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from megalite.cli import main
from megalite.errors import UserError

VERBS = "convert, doctor, generate, inspect, preprocess, schema, slurm, status, tokenizer, train, verify"
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def run(
    *argv: str, code: str = "", stdout: Any = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in an interpreter of its own, after `code`."""
    program = f"{code}\nimport sys; from megalite.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *argv],
        env=os.environ | variables,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


NO_MARKER = """
import megalite.training.local_launch
megalite.training.local_launch.state_writer = lambda plan, announce: None
"""


def prepare_that(statement: str) -> str:
    """Code that puts a stand-in for the first thing that `megalite train` does, of a run in RUN_DIR."""
    return f"""
import os, pathlib, types
import megalite.planning.plan
def prepare(*arguments):
    {statement}
    run = types.SimpleNamespace(dir=pathlib.Path(os.environ["RUN_DIR"]))
    return types.SimpleNamespace(config=types.SimpleNamespace(run=run))
megalite.planning.plan.prepare = prepare
"""


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    heavy = {"torch", "deepspeed", "numpy", "pydantic", "sentencepiece", "matplotlib"}
    code = f"import atexit, sys; atexit.register(lambda: sys.stderr.write(str({heavy} & set(sys.modules))))"
    shown = run("--help", code=code)
    assert (shown.returncode, shown.stderr) == (0, "set()")
    assert all(f" {verb} " in shown.stdout for verb in ("train", "tokenizer", "preprocess", "generate"))


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage: megalite" in capsys.readouterr().out


def test_the_version_needs_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megalite {version('megalite')}\n"


def test_the_package_tells_its_version_and_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import megalite; print(sorted(set(sys.modules) - before))"
    code += "; print(megalite.__version__); print(hasattr(megalite, 'other'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"['megalite']\n{version('megalite')}\nFalse\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_the_verbs(shell: str) -> None:
    words = {"COMP_WORDS": "megalite tr", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "megalite tr"}
    action = {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_MEGALITE_COMPLETE": f"complete_{shell}"}
    done = run(code="import sys; sys.argv[0] = 'megalite'", **words, **action)
    assert "train" in done.stdout, done.stderr
    assert "preprocess" not in done.stdout
    assert done.stderr == ""


# A verb of each kind: an argument, an option, several, and one in a group.
PATHS = [
    (["train", "{}/run.yaml"], "RUN.yaml"),
    (["convert", "{}", "out"], "SOURCE"),
    (["convert", "in", "{}"], "OUTPUT"),
    (["preprocess", "a.txt", "{}", "--tokenizer", "t", "--output", "o"], "INPUT"),
    (["preprocess", "a.txt", "--tokenizer", "{}", "--output", "o"], "--tokenizer"),
    (["preprocess", "a.txt", "--tokenizer", "t", "--output", "{}"], "--output"),
    (["preprocess", "a.txt", "--tokenizer", "t", "--output", "o", "--chat", "{}"], "--chat"),
    (["tokenizer", "train", "a.txt", "--output", "{}"], "--output"),
    (["generate", "{}", "--prompt", "$NOT_SET ~"], "MODEL"),
    (["generate", "m", "--prompt", "x", "--prompts", "{}"], "--prompts"),
    (["inspect", "{}"], None),
    (["status", "{}"], "RUN"),
    (["doctor", "{}"], "[RUN.yaml]"),
    (["verify", "{}"], "RUN.yaml"),
    (["slurm", "{}", "--nodes", "1"], "RUN.yaml"),
    (["slurm", "run.yaml", "--nodes", "1", "--output", "{}"], "--output"),
]


@pytest.mark.parametrize(("argv", "name"), PATHS, ids=[" ".join(argv) for argv, _ in PATHS])
def test_a_path_of_any_verb_names_the_variable_that_is_not_set(
    argv: list[str], name: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    assert main([word.replace("{}", "${NOT_SET}/x") for word in argv]) == 2
    told = capsys.readouterr().err
    assert " needs the variable NOT_SET, which is not set in the environment; set it, " in told
    assert name is None or told.startswith(f"megalite: error: {name}=")


def test_a_path_on_the_command_line_is_expanded_once(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = run_file.rename(run_file.parent / "a$b.yaml")
    calls = []
    monkeypatch.setattr("megalite.training.local_launch.launch_local", lambda argv, *rest, **more: calls.append(argv))
    monkeypatch.setenv("HOME", str(odd.parent))
    assert main(["train", "~/a$$b.yaml", "run.dir=~/own"]) == 0, capsys.readouterr().err
    # What a rank is given is expanded there once more.
    assert calls == [["train", f"{odd.parent}/a$$b.yaml", "run.dir=~/own"]]
    assert (odd.parent / "own").is_dir()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "megalite: error: there is no verb 'trian'; did you mean 'train'?\n"),
        (["zzz"], f"megalite: error: there is no verb 'zzz'; allowed: {VERBS}\n"),
        (["train"], "megalite: error: Missing argument 'RUN.yaml'; see megalite train --help\n"),
    ],
)
def test_a_misuse_is_one_line_and_status_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", message)


@pytest.mark.parametrize("argv", [["tokenizer", "trian"], ["train", "run.yaml", "--dry-ran"]])
def test_a_misspelt_word_further_down_is_status_2_too(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("megalite: error: ")
    assert err.count("\n") == 1
    assert "--help" in err


@pytest.mark.parametrize(
    "option", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"], ["--local-rank", "1"]]
)
def test_deepspeeds_option_in_front_is_ignored(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*option, "train", "--help"]) == 0
    assert "megalite train" in capsys.readouterr().out


def test_a_users_error_is_neither_wrapped_nor_interpreted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = f"run.yaml: [bold]data.train[0][/bold]: {'a long name ' * 30}; use another"

    def prepare(*arguments: object) -> None:
        raise UserError(f"{first}\nrun.yaml: a second fault")

    monkeypatch.setattr("megalite.planning.plan.prepare", prepare)
    assert main(["train", "run.yaml"]) == 2
    expected = f"megalite: checking run.yaml\nmegalite: error: {first}\nmegalite: error: run.yaml: a second fault\n"
    assert capsys.readouterr().err == expected


def test_a_missing_run_file_is_the_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err


def test_by_hand_the_layouts_ranks_are_launched(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def launch_local(argv: list[str], world_size: int, log_dir: Path, **more: float) -> int:
        calls.append((argv, world_size, log_dir, more))
        return 137

    monkeypatch.setattr("megalite.training.local_launch.launch_local", launch_local)
    overrides = ["parallel.tensor=2", "parallel.pipeline=2", "train.max_restarts=3", "checkpoint.every=5"]
    assert main(["train", str(run_file), *overrides]) == 137
    more = {"stop_grace": math.inf, "max_restarts": 3}
    ((argv, world_size, logs, given),) = calls
    assert (argv, world_size, logs) == (["train", str(run_file), *overrides], 4, run_file.parent / "run/logs")
    assert given.items() >= more.items()


def test_a_dry_run_launches_nobody(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("megalite.training.local_launch.launch_local")
    assert main(["train", "--dry-run", str(run_file), "parallel.pipeline=2"]) == 0
    told = capsys.readouterr().out
    assert "pipeline 2" in told
    assert "checkpoints: at the last step | 60 MB each | 1 at most at a time, 60 MB | " in told
    assert not (run_file.parent / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["checkpoint.every=4"],
            "checkpoints: every 4 steps and at the last step | 60 MB each | 3 at most at a time",
        ),
        (
            ["checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.last=false"],
            "every 1 steps | 60 MB each | 3",
        ),
        (["train.steps=2"], "note: train.schedule.warmup_steps=2, not 3 as in the run file: train.steps=2"),
        (["checkpoint.last=false"], "none, the run leaves no model: checkpoint.every=0 and checkpoint.last=false"),
        (
            ["checkpoint.last=false", "checkpoint.every=11"],
            "checkpoint.every=11 is beyond the last step, 10, and ",
        ),
    ],
)
def test_a_dry_run_says_what_will_be_kept(
    run_file: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], line: str
) -> None:
    assert main(["train", "--dry-run", str(run_file), *overrides]) == 0
    assert line in capsys.readouterr().out


def test_a_launched_rank_takes_its_place(tmp_path: Path) -> None:
    code = (
        prepare_that("print(arguments[1:], flush=True)")
        + NO_MARKER
        + """
import os, sys, types
def train(plan, environment, marker):
    print(environment.rank, environment.launcher, os.environ["LOCAL_WORLD_SIZE"])
sys.modules["megalite.training.train"] = types.SimpleNamespace(train=train)
"""
    )
    done = run(
        "--local_rank=1",
        "train",
        "run.yaml",
        "train.steps=3",
        code=code,
        **LAUNCHED,
        CROSS_RANK="0",
        RUN_DIR=str(tmp_path),
    )
    assert (done.returncode, done.stdout) == (0, "(['train.steps=3'], 2)\n1 deepspeed 2\n"), done.stderr


def test_a_failing_rank_marks_every_line_of_its_traceback() -> None:
    failed = run("train", "run.yaml", code=prepare_that("raise RuntimeError('two\\nlines')"), **LAUNCHED)
    assert failed.returncode == 1
    lines = failed.stderr.splitlines()
    assert lines[0].endswith("] Traceback (most recent call last):")
    assert all(line.startswith("[rank 1 on ") for line in lines)
    assert [line.partition("] ")[2] for line in lines[-2:]] == ["RuntimeError: two", "lines"]


def test_a_failing_rank_leaves_at_once() -> None:
    """Whatever threads or exit handlers it has: they may wait for peers that wait for this rank's end."""
    wait = "import atexit, threading, time; threading.Thread(target=time.sleep, args=(100,)).start()\n"
    failed = run("train", "run.yaml", code=wait + prepare_that("raise RuntimeError"), **LAUNCHED)
    assert failed.returncode == 1


def test_a_rank_that_is_done_leaves_at_once(tmp_path: Path) -> None:
    """A thread of torch that asks for the interpreter while it is taken down aborts the process."""
    code = prepare_that("pass") + NO_MARKER + "\nimport atexit, os, sys, types; atexit.register(os.abort)\n"
    code += (
        "sys.modules['megalite.training.train'] = "
        "types.SimpleNamespace(train=lambda plan, environment, marker: print('done'))"
    )
    done = run("train", "run.yaml", code=code, **LAUNCHED, RUN_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


STARTS = "megalite: checking run.yaml\n"
LOST = "megalite: error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("variables", [{}, {"PYTHONUNBUFFERED": "1"}, LAUNCHED], ids=["plain", "unbuffered", "a rank"])
@pytest.mark.parametrize("end", ["flush=True", "end=' '"], ids=["written at once", "written at the end"])
def test_a_stdout_that_is_full_is_one_line_and_status_1(variables: dict[str, str], end: str) -> None:
    said = prepare_that(f"print('found', {end}); import typer; raise typer.Exit")
    with open("/dev/full", "w") as full:
        found = run("train", "run.yaml", code=said, stdout=full, **variables)
    assert (found.returncode, found.stderr) == (1, LOST if "RANK" in variables else STARTS + LOST)


def test_another_file_that_cannot_be_written_is_a_failure_of_its_own() -> None:
    failed = run("train", "run.yaml", code=prepare_that("open('/dev/full', 'wb', buffering=0).write(b'x')"))
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"{STARTS}Traceback")


def test_who_reads_no_further_is_told_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        found = run("train", "--help", stdout=closed)
    assert (found.returncode, found.stderr) == (1, "")


WRONG = prepare_that("raise megalite.errors.UserError('run.yaml: wrong')")
MESSAGE = "megalite: error: run.yaml: wrong\n"


@pytest.mark.parametrize(
    ("variables", "heard"),
    [
        ({"RANK": "0"}, MESSAGE),
        ({"RANK": "1"}, ""),
        # A rank of our own launcher has a log of its own.
        ({"RANK": "1", "MEGALITE_LAUNCHER_PID": str(os.getpid())}, MESSAGE),
    ],
    ids=["rank 0", "another rank", "another rank, by hand"],
)
def test_rank_0_speaks_for_all_where_they_share_a_console(variables: dict[str, str], heard: str) -> None:
    code = f"{WRONG}\nimport megalite.cli.exit\nmegalite.cli.exit.RANK_ZERO_SECONDS = 0.5"
    found = run("train", "run.yaml", code=code, **LAUNCHED | variables)
    assert (found.returncode, found.stderr) == (2, heard)


def test_a_rank_says_what_rank_0_has_not_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as rank_zero:
        port = str(rank_zero.getsockname()[1])
        found = run("train", "run.yaml", code=WRONG, **LAUNCHED | {"MASTER_PORT": port})
    assert (found.returncode, found.stderr) == (2, MESSAGE)


def test_a_rank_that_waits_for_rank_0_keeps_its_status_when_its_launcher_ends_it() -> None:
    end = f"""{WRONG}
import os, signal, megalite.cli.exit
megalite.cli.exit.socket.create_connection = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)
"""
    found = run("train", "run.yaml", code=end, **LAUNCHED)
    assert (found.returncode, found.stderr) == (2, "")
