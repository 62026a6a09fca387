import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megalite.data.indexed import IndexedDataset
from megalite.data.inputs import Chunk
from megalite.data.preprocess import _CHUNKS_PER_WORKER, EncodedChunk, _encode_in_order, preprocess
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import UserError


@pytest.fixture
def corpus(tmp_path, sentences, write_jsonl):
    return write_jsonl(tmp_path / "corpus.jsonl", sentences)


@pytest.fixture
def many_chunks(monkeypatch):
    """Cut files into many chunks."""
    from megalite.data import inputs

    monkeypatch.setattr("megalite.data.preprocess.chunks", lambda path: inputs.chunks(path, 500))


def outputs(prefix: Path) -> dict[str, bytes]:
    return {path.suffix: path.read_bytes() for path in sorted(prefix.parent.glob(f"{prefix.name}.*"))}


def test_documents_become_their_tokens(corpus, sentences, tokenizer_path, tmp_path):
    report = preprocess([corpus], tokenizer_path, tmp_path / "out" / "data", workers=1)
    dataset = IndexedDataset(tmp_path / "out" / "data")
    expected = load_tokenizer(tokenizer_path).encode_batch(sentences)
    assert [dataset.document_tokens(i).tolist() for i in range(dataset.num_documents)] == expected
    assert (report.documents, report.tokens) == (300, sum(map(len, expected)))
    assert report.text_bytes == corpus.stat().st_size
    assert (report.empty, report.skipped, report.problems) == (0, 0, ())


def test_the_end_of_document_counts_in_the_length(corpus, sentences, tokenizer_path, tmp_path):
    report = preprocess([corpus], tokenizer_path, tmp_path / "data", append_eod=True, workers=1)
    dataset = IndexedDataset(tmp_path / "data")
    expected = load_tokenizer(tokenizer_path).encode_batch(sentences)
    assert [dataset.document_tokens(i).tolist() for i in range(300)] == [[*ids, 2] for ids in expected]
    assert report.tokens == sum(map(len, expected)) + 300


def test_the_sidecar_says_what_the_tokens_are(corpus, sentences, tokenizer_path, tmp_path):
    report = preprocess([corpus], tokenizer_path, tmp_path / "data", append_eod=True, workers=1)
    tokenizer = load_tokenizer(tokenizer_path)
    counts = Counter(token for ids in tokenizer.encode_batch(sentences) for token in [*ids, 2])
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    content = json.loads((tmp_path / "data.json").read_text())
    assert content == {
        "vocab_size": 400,
        "tokenizer_sha256": tokenizer.digest,
        "num_tokens": total,
        "num_documents": 300,
        "max_token_id": max(counts),
        "token_counts_entropy": pytest.approx(entropy, rel=1e-12),
    }
    assert report.entropy == content["token_counts_entropy"]
    assert IndexedDataset(tmp_path / "data").sidecar is not None


def test_any_number_of_workers_writes_the_same_bytes(corpus, sentences, tokenizer_path, tmp_path, many_chunks):
    packed = tmp_path / "more.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    (tmp_path / "text.txt").write_text("".join(sentences))
    inputs = [corpus, packed, tmp_path / "text.txt"]
    written = []
    for workers in (1, 2, 3):
        report = preprocess(inputs, tokenizer_path, tmp_path / str(workers) / "data", append_eod=True, workers=workers)
        assert report.workers == workers
        written.append(outputs(tmp_path / str(workers) / "data"))
    assert set(written[0]) == {".bin", ".idx", ".json"}
    assert written[0] == written[1] == written[2]


def test_the_chunks_leave_no_trace(corpus, tokenizer_path, tmp_path, request):
    preprocess([corpus], tokenizer_path, tmp_path / "whole" / "data", workers=1)
    request.getfixturevalue("many_chunks")
    preprocess([corpus], tokenizer_path, tmp_path / "cut" / "data", workers=1)
    assert outputs(tmp_path / "whole" / "data") == outputs(tmp_path / "cut" / "data")


def test_only_a_few_chunks_are_under_way():
    cut = 0

    def work():
        nonlocal cut
        for number in range(100):
            cut += 1
            yield Chunk(Path("x"), number, number + 1, 1)

    def encode(chunk: Chunk) -> EncodedChunk:
        return chunk  # pyright: ignore[reportReturnType] (only the order matters here)

    with ThreadPoolExecutor(2) as pool:
        for taken, chunk in enumerate(_encode_in_order(pool, encode, 2, work())):
            assert chunk.start == taken  # pyright: ignore[reportAttributeAccessIssue]
            assert cut - taken <= 2 * _CHUNKS_PER_WORKER
    assert cut == 100


BAD_LINES = {
    "invalid JSON": b"{",
    "no key 'text'; did you mean 'test'": b'{"test": "a"}',
    "holds a JSON list; a document is a string": b'{"text": []}',
    "invalid UTF-8 at byte 11": b'{"text": "\xff"}',
}


@pytest.mark.parametrize("reason", BAD_LINES)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_malformed_line_is_named_and_nothing_is_written(
    corpus, tokenizer_path, tmp_path, many_chunks, reason, workers
):
    lines = corpus.read_bytes().splitlines()
    lines[249] = lines[280] = BAD_LINES[reason]
    corpus.write_bytes(b"\n".join(lines))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError) as caught:
        preprocess([corpus], tokenizer_path, tmp_path / "out" / "data", workers=workers)
    assert str(caught.value).startswith(f"{corpus}:250: ")
    assert reason in str(caught.value)
    assert "--on-error skip" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_lines_are_counted_anew_in_every_file(corpus, tokenizer_path, tmp_path, many_chunks):
    (tmp_path / "second.jsonl").write_bytes(b"\n" * 1000 + b"{")
    with pytest.raises(UserError, match=r"second\.jsonl:1001: invalid JSON"):
        preprocess([corpus, tmp_path / "second.jsonl"], tokenizer_path, tmp_path / "data", workers=1)


def test_malformed_lines_are_left_out_and_counted(
    corpus, sentences, tokenizer_path, tmp_path, many_chunks, write_jsonl
):
    lines = corpus.read_bytes().splitlines()
    for place in range(20):
        lines[place * 15] = b"{"
    corpus.write_bytes(b"\n".join(lines))
    report = preprocess([corpus, corpus], tokenizer_path, tmp_path / "skipped" / "data", workers=1, on_error="skip")
    good = [text for place, text in enumerate(sentences) if place % 15]
    clean = write_jsonl(tmp_path / "clean.jsonl", good + good)
    preprocess([clean], tokenizer_path, tmp_path / "clean" / "data", workers=1)
    assert outputs(tmp_path / "skipped" / "data") == outputs(tmp_path / "clean" / "data")
    assert report.skipped == 40
    assert len(report.problems) == 10
    assert report.problems[1].startswith(f"{corpus}:16: invalid JSON")


def test_documents_without_tokens_are_left_out_and_counted(tokenizer_path, tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", ["fox", "", "dog", ""])
    report = preprocess([path], tokenizer_path, tmp_path / "data", append_eod=True, workers=1)
    assert (report.documents, report.empty) == (2, 2)


def test_wide_vocabularies_are_stored_wide(tmp_path, write_jsonl):
    vocabulary = {"a": 0, "b": 69_999, "<|endoftext|>": 70_000}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []})
    )
    path = write_jsonl(tmp_path / "a.jsonl", ["ab", "b"])
    preprocess([path], tmp_path, tmp_path / "data", append_eod=True, workers=1)
    dataset = IndexedDataset(tmp_path / "data")
    assert dataset.dtype.itemsize == 4
    assert dataset.tokens(0, 5).tolist() == [0, 69_999, 70_000, 69_999, 70_000]


def test_another_key_is_read(tmp_path, tokenizer_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1, "content": "fox"}\n')
    preprocess([tmp_path / "a.jsonl"], tokenizer_path, tmp_path / "data", text_key="content", workers=1)
    assert load_tokenizer(tokenizer_path).decode(IndexedDataset(tmp_path / "data").tokens(0, 1).tolist()) != ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "skp"}, r"--on-error=skp; did you mean 'skip'"),
        ({"workers": 0}, r"--workers=0: allowed are 1 and more"),
    ],
)
def test_options_that_cannot_be_are_refused(corpus, tokenizer_path, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        preprocess([corpus], tokenizer_path, tmp_path / "data", **options)


def test_a_tokenizer_without_end_of_document_is_refused(corpus, tmp_path):
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    with pytest.raises(UserError, match=r"tokenizer\.json: has no end-of-document token for --append-eod"):
        preprocess([corpus], tmp_path / "tokenizer.json", tmp_path / "data", append_eod=True)


def test_input_without_a_document_is_refused(tmp_path, tokenizer_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(UserError, match="not one document with text under 'text'"):
        preprocess([path], tokenizer_path, tmp_path / "data")
    assert not (tmp_path / "data.idx").exists()


def test_progress_reaches_the_total(corpus, tokenizer_path, tmp_path, many_chunks):
    told = []
    preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1, progress=lambda *pair: told.append(pair))
    assert len(told) > 3
    assert told == sorted(told)
    assert told[-1] == (corpus.stat().st_size, corpus.stat().st_size)


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    def is_worker(child: psutil.Process) -> bool:
        try:
            return any("spawn_main" in word for word in child.cmdline())
        except psutil.Error:  # it has ended meanwhile
            return False

    return [child for child in process.children() if is_worker(child)]


def test_a_killed_worker_is_an_error(corpus, tokenizer_path, tmp_path, many_chunks):
    def kill_workers(done: int, total: int) -> None:
        for worker in workers_of(psutil.Process()):
            worker.kill()

    with pytest.raises(UserError, match="a worker process was killed"):
        preprocess([corpus], tokenizer_path, tmp_path / "data", workers=2, progress=kill_workers)
    assert not list(tmp_path.glob("data*"))


def test_workers_do_not_outlive_a_killed_parent(corpus, tokenizer_path, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from megalite.data.preprocess import preprocess\n"
        "if __name__ == '__main__':\n"
        "    corpus, tokenizer, output = map(Path, sys.argv[1:])\n"
        "    preprocess([corpus], tokenizer, output, workers=2, progress=lambda *_: time.sleep(60))\n"
    )
    command = [sys.executable, str(script), str(corpus), str(tokenizer_path), str(tmp_path / "data")]
    parent = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        while not (workers := workers_of(psutil.Process(parent.pid))) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert workers
        time.sleep(1)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    for worker in alive:
        worker.kill()
    assert not alive


def test_the_tool_takes_the_options_of_megatron(corpus, tokenizer_path, tmp_path):
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    command = [sys.executable, str(tool), "--input", str(corpus), "--tokenizer-model", str(tokenizer_path)]
    command += ["--output-prefix", str(tmp_path / "my"), "--append-eod", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "300 documents" in done.stdout
    assert IndexedDataset(tmp_path / "my_text_document").num_documents == 300
    failed = subprocess.run([*command, "--json-keys", "body"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"{corpus}:1: no key 'body'")
    assert failed.stderr.count("\n") == 1
