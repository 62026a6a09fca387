import io
import json
import re
import threading
import time
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from megalite.cli import main, preprocess, progress, tokenizer
from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.tokenizers.load import load_tokenizer
from megalite.errors import UserError

TEXTS = [f"the fox number {n} jumps over the lazy dog number {n * n}" for n in range(200)]


class Screen(io.StringIO):
    """A terminal that keeps what was written."""

    def __init__(self, shown: list[str]) -> None:
        super().__init__()
        self._shown = shown

    def write(self, text: str) -> int:
        self._shown.append(text)
        return len(text)


@pytest.fixture
def app():
    app = typer.Typer()
    tokenizer.register(app)
    preprocess.register(app)
    return app


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return path


def run(app: typer.Typer, *words: str | Path):
    return CliRunner().invoke(app, [str(word) for word in words])


def train(app, corpus, tmp_path):
    words = (
        "tokenizer",
        "train",
        corpus,
        "--vocab-size",
        "320",
        "--output",
        tmp_path / "tok.model",
        "--text-key",
        "body",
    )
    return run(app, *words)


def test_text_becomes_a_dataset_by_two_commands(app, corpus, tmp_path):
    trained = train(app, corpus, tmp_path)
    assert trained.exit_code == 0, trained.output
    assert re.search(r"tok\.model: 320 token ids from 200 documents, 0\.01 MB, trained in \d+\.\d s\n", trained.output)

    with corpus.open("a") as file:
        file.write('{\n{"body": ""}\n')
    words = ("preprocess", corpus, "--tokenizer", tmp_path / "tok.model", "--output", tmp_path / "data" / "corpus")
    words += ("--text-key", "body", "--append-eod", "--workers", "1", "--on-error", "skip")
    done = run(app, *words)
    assert done.exit_code == 0, done.output
    dataset = IndexedDataset(tmp_path / "data" / "corpus")
    assert dataset.num_documents == 200
    assert dataset.document_tokens(0)[-1] == 2
    first, speed, entropy, empty, skipped, *problems = done.output.splitlines()
    input_bytes = f"{corpus.stat().st_size / dataset.num_tokens:.2f} bytes of input"
    assert first.endswith(f"200 documents, {dataset.num_tokens:,} tokens ({input_bytes} a token)")
    assert re.fullmatch(r"speed: [\d.]+ MB/s, [\d,]+ tokens/s, [\d.]+ s with 1 process", speed)
    assert dataset.sidecar is not None
    assert entropy.startswith(
        f"unigram entropy: {dataset.sidecar.token_counts_entropy:.3f} nats a token (uniform over 320"
    )
    assert empty == "left out: 1 documents without a token"
    assert skipped == "left out: 1 malformed documents"
    size = corpus.stat().st_size
    assert problems[0].startswith(f"  {corpus}:201: byte {size - 13 - 1}: invalid JSON")
    assert problems[1:] == [f"  {corpus}:202: byte {size - 13}: an empty document"]


def test_what_is_left_out_is_told(app, corpus, tmp_path):
    train(app, corpus, tmp_path)
    corpus.write_text(corpus.read_text() * 2 + '{"body": "fox"}\n')
    words = ("preprocess", corpus, "--tokenizer", tmp_path / "tok.model", "--output", tmp_path / "data")
    words += ("--text-key", "body", "--eod-token", "<s>", "--workers", "1", "--dedup", "--min-tokens", "9")
    done = run(app, *words, "--document-shuffle", "7")
    assert done.exit_code == 0, done.output
    dataset = IndexedDataset(tmp_path / "data")
    assert dataset.num_documents == 200
    assert dataset.document_tokens(0)[-1] == 1
    assert done.output.splitlines()[3:] == [
        "left out: 1 documents shorter than --min-tokens",
        "left out: 200 documents equal to an earlier one",
    ]


def test_the_bar_shows_bytes_tokens_and_what_is_left(monkeypatch):
    shown = []
    screen = Console(file=Screen(shown), force_terminal=True, color_system=None, width=120)
    monkeypatch.setattr("rich.console.Console", lambda stderr: screen)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    threads = threading.active_count()
    with progress.token_progress("tokenizing") as tell:
        assert threading.active_count() == threads
        time.sleep(0.11)
        tell(5_000_000, 10_000_000, 1_000_000)
    text = "".join(shown)
    assert re.search(r"tokenizing .* 5\.0/10\.0 MB .* [\d,]+ tokens/s", text)


def test_a_tokenizer_with_control_tokens_takes_conversations(app, corpus, tmp_path):
    names = ("<|im_start|>", "<|im_end|>")
    words = (
        "tokenizer",
        "train",
        corpus,
        "--output",
        tmp_path / "tok.model",
        "--vocab-size",
        "320",
        "--text-key",
        "body",
    )
    done = run(app, *words, *(word for name in names for word in ("--control-token", name)))
    assert done.exit_code == 0, done.output
    chat = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "the fox? <|im_end|>"}, {"role": "assistant", "content": "the lazy dog"}]
    chat.write_text(json.dumps({"messages": messages}) + "\n")
    words = (
        "preprocess",
        chat,
        "--chat",
        "chatml",
        "--tokenizer",
        tmp_path / "tok.model",
        "--output",
        tmp_path / "chat",
    )
    done = run(app, *words)
    assert done.exit_code == 0, done.output
    loaded = load_tokenizer(tmp_path / "tok.model")
    ids = IndexedDataset(tmp_path / "chat").document_tokens(0).tolist()
    start, end = map(loaded.token_id, names)
    assert (ids.count(start), ids.count(end)) == (2, 2), "what a message says is text"


@pytest.mark.parametrize("names", [["<a>", "<a>"], ["<s>"], [""]])
def test_a_control_token_stands_once(app, corpus, tmp_path, names):
    words = ("tokenizer", "train", corpus, "--output", tmp_path / "tok.model", "--text-key", "body")
    done = run(app, *words, *(word for name in names for word in ("--control-token", name)))
    assert str(done.exception).startswith(f"--control-token={names[-1]}: ")


def test_what_the_user_can_mend_is_a_user_error(app, corpus, tmp_path):
    words = ("preprocess", corpus, "--tokenizer", tmp_path / "none.model", "--output", tmp_path / "data")
    assert isinstance(run(app, *words).exception, UserError)
    words = ("tokenizer", "train", corpus, "--output", tmp_path / "tok.model")
    assert isinstance(run(app, *words).exception, UserError)


@pytest.mark.parametrize("words", [("tokenizer", "train", "x.jsonl"), ("preprocess",), ("tokenizer", "trian")])
def test_misuse_ends_with_status_2(app, words):
    assert run(app, *words).exit_code == 2


@pytest.mark.parametrize("verb", ["preprocess", "tokenizer"])
def test_an_output_that_cannot_be_written_is_the_users_error(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, model = tmp_path / "text.txt", tmp_path / "tok.model"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    assert main(["tokenizer", "train", str(text), "--vocab-size", "300", "--output", str(model)]) == 0
    capsys.readouterr()
    for output in (text / "below", Path("/proc/below")):
        argv = ["preprocess", str(text), "--tokenizer", str(model), "--output", str(output), "--workers", "1"]
        if verb == "tokenizer":
            argv = ["tokenizer", "train", str(text), "--vocab-size", "300", "--output", str(output)]
        assert main(argv) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"megalite: error: {output}: cannot be written: ")
        assert message.endswith("; give another --output\n")


def test_nothing_is_overwritten_without_force(app, corpus, tmp_path):
    assert train(app, corpus, tmp_path).exit_code == 0
    again = train(app, corpus, tmp_path)
    assert str(again.exception) == (
        f"{tmp_path}/tok.model: is there already; give another --output, or overwrite it with --force"
    )
    words = ("preprocess", corpus, "--tokenizer", tmp_path / "tok.model", "--output", tmp_path / "data")
    words += ("--text-key", "body", "--workers", "1")
    assert run(app, *words).exit_code == 0
    assert str(run(app, *words).exception).startswith(f"{tmp_path}/data.idx: is there already; ")
    assert run(app, *words, "--force").exit_code == 0
    words = ("tokenizer", "train", corpus, "--output", corpus, "--text-key", "body", "--force")
    assert str(run(app, *words).exception) == f"{corpus}: is an input; give another --output"


@pytest.mark.parametrize("verb", ["preprocess", "tokenizer"])
def test_an_output_with_a_slash_behind_is_a_folder(app, corpus, tmp_path, verb):
    words = ("preprocess", corpus, "--tokenizer", tmp_path / "t.model", "--output", f"{tmp_path}/out/")
    if verb == "tokenizer":
        words = ("tokenizer", "train", corpus, "--output", f"{tmp_path}/out/")
    assert str(run(app, *words).exception) == (
        f"--output={tmp_path}/out/: names a folder; write a name in it, such as {tmp_path}/out/corpus"
    )
    assert not list(tmp_path.glob("out*"))


def test_keys_that_are_not_read_and_notes_are_told(app, corpus, tmp_path):
    train(app, corpus, tmp_path)
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"id": 1, "messages": [{"role": "assistant", "content": "the fox"}]}) + "\n")
    words = ("preprocess", chat, "--chat", "plain", "--tokenizer", tmp_path / "tok.model", "--output", tmp_path / "c")
    done = run(app, *words)
    assert done.output.splitlines()[3:] == ["not read: keys of conversations: id of 1"]
