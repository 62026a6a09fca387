"""``megalite generate``: what it prints as text is made, in files and as JSON, and how ranks share the work."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from generating import GREEDY, LLAMA, continued, save_model, train_tokenizer

from megalite.cli import main
from megalite.generation.request import Limits

TEXTS = ["the fox", "a lazy dog", "the quick brown"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "step_0"
    save_model(folder, LLAMA, train_tokenizer(folder.parent))
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[str]:
    return [row.text for row in continued(checkpoint, TEXTS, GREEDY, Limits(9))]


def generate(*words: str | Path) -> int:
    return main(["generate", *map(str, words), "--greedy", "--max-new-tokens", "9"])


def test_the_text_of_one_prompt_appears_as_it_is_made(
    checkpoint: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr("typer.echo", lambda text, **how: written.append(text))
    assert generate(checkpoint, "--prompt", TEXTS[0]) == 0
    first, *pieces, end, summary = written
    assert (first, end) == (TEXTS[0], "\n")
    assert "".join(pieces) == expected[0]
    assert len([piece for piece in pieces if piece]) > 3
    assert summary.startswith("9 tokens in ")
    assert summary.endswith(" tokens/s; ended by length")


def test_several_prompts_are_shown_in_their_order(
    checkpoint: Path, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS[1:]))
    assert generate(checkpoint, "--prompt", TEXTS[0], "--prompts", tmp_path / "prompts.txt", "--batch-size", "2") == 0
    shown = capsys.readouterr()
    blocks = [f"[{at}/3]\n{text}{more}\n" for at, (text, more) in enumerate(zip(TEXTS, expected, strict=True), 1)]
    assert shown.out == "\n".join(blocks)
    assert shown.err.startswith("3 prompts, 27 tokens in ")


def test_json_tells_of_each_prompt(checkpoint: Path, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    stop = expected[0][2:5]
    assert generate(checkpoint, "--prompt", TEXTS[0], "--prompt", TEXTS[1], "--json", "--stop", stop) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == expected[0][: expected[0].index(stop)]
    assert first["reason"] == "stop"
    assert (second["prompt"], second["text"], second["reason"]) == (TEXTS[1], expected[1], "length")
    assert second["tokens"] == 9
    assert second["prompt_tokens"] > 1
    assert second["tokens_per_second"] > 0


def test_a_text_that_ends_late_is_waited_for(
    checkpoint: Path, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of two ends first; the first is still shown first."""
    stop = next(part for part in (expected[1][at : at + 3] for at in range(6)) if part not in expected[0])
    assert generate(checkpoint, "--prompt", TEXTS[0], "--prompt", TEXTS[1], "--json", "--stop", stop) == 0
    records = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [record["prompt"] for record in records] == TEXTS[:2]
    assert [record["reason"] for record in records] == ["length", "stop"]


def test_a_file_is_there_whole_or_not_at_all(
    checkpoint: Path,
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "new" / "texts.txt"
    assert generate(checkpoint, "--prompt", TEXTS[0], "--output", output) == 0
    assert output.read_text() == f"{TEXTS[0]}{expected[0]}\n"
    assert capsys.readouterr().out == ""

    def fail(*arguments: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr("megalite.generation.generator.Generator.run", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        generate(checkpoint, "--prompt", TEXTS[0], "--output", tmp_path / "other.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    assert [path.name for path in output.parent.iterdir()] == ["texts.txt"]


def test_a_console_that_takes_no_more_is_one_line(checkpoint: Path) -> None:
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "megalite", "generate", str(checkpoint), "--prompt", TEXTS[0]]
        found = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    message = "megalite: error: standard output cannot be written: No space left on device\n"
    assert (found.returncode, found.stderr) == (1, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--prompt: nothing to continue"),
        (["--prompt", "a", "--temperature", "0.5"], "--greedy: stands beside --temperature=0.5; keep one of them"),
        (["--prompt", "a", "--tensor", "3"], "--tensor=3 does not divide model.num_attention_heads=4; use 1, 2 or 4"),
        (["--prompt", "a", "--tensor", "0"], "--tensor=0: "),
        (["--prompt", "a", "--top-p", "0"], "--top-p=0.0: "),
        (["--prompt", "a", "--output", "/dev/null/x"], "--output=/dev/null/x: "),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(
    checkpoint: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(checkpoint, *words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"megalite: error: {message}")
    assert shown.err.count("\n") == 1


def test_where_there_is_no_model_the_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "absent", "--prompt", "a") == 2
    assert capsys.readouterr().err.startswith(f"megalite: error: {tmp_path}/absent: ")


def test_ranks_are_launched_with_the_same_words(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "megalite.cli.generate.launch_local", lambda words, size, logs: calls.append((words, size)) or 0
    )
    words = ["--prompt=-a b", "--prompt=c", "--top-k=5", "--tensor=2", "--json"]
    assert main(["generate", str(checkpoint), *words]) == 0
    [(given, size)] = calls
    assert size == 2
    assert set(words) <= set(given)
    assert given[-2:] == ["--", str(checkpoint)]
    # What a rank makes of them is what was given.
    calls.clear()
    assert main(given) == 0
    assert calls == [(given, 2)]


def test_an_interrupt_is_no_traceback(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megalite.generation.generator.Generator.run", interrupt)
    assert generate(checkpoint, "--prompt", "a") == 130
    assert "Traceback" not in capsys.readouterr().err


def run(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return warm.run([*warm.MEGALITE, "generate", *map(str, words)], timeout=120, env=os.environ | variables)


@pytest.mark.full
def test_two_ranks_print_once_what_one_process_prints(checkpoint: Path, expected: list[str], tmp_path: Path) -> None:
    words = [checkpoint, *(f"--prompt={text}" for text in TEXTS), "--greedy", "--max-new-tokens=9"]
    shared = run(*words, "--tensor=2", TMPDIR=str(tmp_path))
    alone = run(*words)
    assert (shared.returncode, shared.stdout) == (0, alone.stdout), shared.stderr
    assert all(text in shared.stdout for text in expected)
    assert shared.stderr.startswith("3 prompts, 27 tokens in ")
    assert shared.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # the ranks' logs are gone


@pytest.mark.full
def test_of_a_launchers_ranks_the_first_alone_speaks(checkpoint: Path, expected: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "megalite", "generate", str(checkpoint), f"--prompt={TEXTS[0]}", "--greedy"]
                + ["--max-new-tokens=9"],
                env=os.environ | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    (first, told), (second, silence) = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told + silence
    assert first == f"{TEXTS[0]}{expected[0]}\n"
    assert told.startswith("9 tokens in ")
    assert (second, silence) == ("", "")


def test_the_launchers_ranks_must_be_those_asked_for(checkpoint: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    refused = run(checkpoint, "--prompt=a", "--tensor=2", **place)
    assert refused.returncode == 2
    assert refused.stderr == ("megalite: error: --tensor=2: environment started 4 ranks; start 2, or leave it out\n")
