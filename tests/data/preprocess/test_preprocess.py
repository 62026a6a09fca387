import gzip
import hashlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.preprocess import deduplicate, inputs, merge_shards
from megalite.data.preprocess import preprocess as preprocess_module
from megalite.data.preprocess.preprocess import preprocess
from megalite.data.tokenizers.load import load_tokenizer
from megalite.errors import UserError

SHARD_BYTES = 500


@pytest.fixture
def corpus(tmp_path, sentences, write_jsonl):
    return write_jsonl(tmp_path / "corpus.jsonl", sentences)


@pytest.fixture
def many_shards(monkeypatch):
    """Cut files into many shards; yields a function to say how large ones."""

    def cut(shard_bytes: int) -> None:
        monkeypatch.setattr(preprocess_module, "shards", partial(inputs.shards, shard_bytes=shard_bytes))

    cut(SHARD_BYTES)
    return cut


def outputs(prefix: Path) -> dict[str, bytes]:
    return {path.suffix: path.read_bytes() for path in sorted(prefix.parent.glob(f"{prefix.name}.*"))}


def tokens_and_index(prefix: Path) -> tuple[bytes, bytes]:
    return prefix.with_suffix(".bin").read_bytes(), prefix.with_suffix(".idx").read_bytes()


def texts_of(prefix: Path, tokenizer_path: Path) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), load_tokenizer(tokenizer_path)
    return [tokenizer.decode(dataset.document_tokens(i).tolist()) for i in range(dataset.num_documents)]


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
        "eod_id": 2,
        "eod_token": "<|endoftext|>",
        "bos_id": None,
        "bos_token": None,
        "skipped": 0,
        "empty": 0,
        "short": 0,
        "duplicates": 0,
        "ignored": {},
        "document_shuffle": None,
        "sha256": {".bin": hashlib.sha256((tmp_path / "data.bin").read_bytes()).hexdigest()},
    }
    assert report.entropy == content["token_counts_entropy"]
    assert IndexedDataset(tmp_path / "data").sidecar is not None


OPTIONS = [
    {},
    {"split_lines": True, "eod_token": "<s>", "min_tokens": 12, "on_error": "skip"},
    {"dedup": True, "append_eod": True},
    {"document_shuffle": 3, "dedup": True, "min_tokens": 5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_any_number_of_workers_writes_the_same_bytes(corpus, sentences, tokenizer_path, tmp_path, many_shards, options):
    packed = tmp_path / "more.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    (tmp_path / "text.txt").write_text("".join(sentences))
    table = pyarrow.table({"text": [f"{text}!" for text in sentences]})
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet", row_group_size=50)
    inputs = [corpus, packed, tmp_path / "text.txt", tmp_path / "table.parquet"]
    written = []
    for workers, size in ((1, 500), (2, 500), (4, 500), (1, 3000), (1, 1 << 20)):
        many_shards(size)
        prefix = tmp_path / f"{workers}-{size}" / "data"
        report = preprocess(inputs, tokenizer_path, prefix, workers=workers, **options)
        assert report.workers == workers
        written.append(outputs(prefix))
    assert set(written[0]) == {".bin", ".idx", ".json"}
    assert written[1:] == written[:1] * 4


def test_processes_are_forked_from_one_without_threads_and_spawned_otherwise(corpus, tokenizer_path, tmp_path):
    script = (
        "import sys, threading\n"
        "from megalite.data.preprocess.workers import _context\n"
        "print(_context().get_start_method())\n"
        "done = threading.Event()\n"
        "threading.Thread(target=done.wait).start()\n"
        "print(_context().get_start_method())\n"
        "done.set()\n"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["fork", "spawn"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_however_processes_are_started_the_bytes_are_the_same(corpus, tokenizer_path, tmp_path, method):
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from functools import partial\n"
        "from pathlib import Path\n"
        "from megalite.data.preprocess import preprocess\nfrom megalite.data.preprocess import inputs, workers\n"
        "if __name__ == '__main__':\n"
        f"    workers._context = lambda: multiprocessing.get_context({method!r})\n"
        f"    preprocess.shards = partial(inputs.shards, shard_bytes={SHARD_BYTES})\n"
        "    corpus, tokenizer, output = map(Path, sys.argv[1:])\n"
        "    preprocess.preprocess([corpus], tokenizer, output, workers=2)\n"
    )
    command = [sys.executable, str(script), str(corpus), str(tokenizer_path), str(tmp_path / "data")]
    subprocess.run(command, check=True)
    preprocess([corpus], tokenizer_path, tmp_path / "here", workers=1)
    assert outputs(tmp_path / "data") == outputs(tmp_path / "here")


BAD_LINES = {
    "invalid JSON": b"{",
    "no key 'text'; did you mean 'test'": b'{"test": "a"}',
    "holds a JSON list; a document is a string": b'{"text": []}',
    "invalid UTF-8": b'{"text": "\xff"}',
    "an empty document": b'{"text": ""}',
}


@pytest.mark.parametrize("reason", BAD_LINES)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_malformed_line_is_named_and_nothing_is_written(
    corpus, tokenizer_path, tmp_path, many_shards, reason, workers
):
    lines = corpus.read_bytes().splitlines()
    # In the next shards as well, which another worker may have done before.
    lines[249:270] = [BAD_LINES[reason]] * 21
    lines[251] = b"{"
    corpus.write_bytes(b"\n".join(lines))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError) as caught:
        preprocess([corpus], tokenizer_path, tmp_path / "out" / "data", workers=workers)
    byte = sum(len(line) + 1 for line in lines[:249]) + {"invalid JSON": 1, "invalid UTF-8": 10}.get(reason, 0)
    assert str(caught.value).startswith(f"{corpus}:250: byte {byte}: ")
    assert reason in str(caught.value)
    assert "--on-error skip" in str(caught.value)
    assert f"finished shards stay in {tmp_path / 'out' / 'data.work'}: the same command" in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data.work"]


def test_what_was_finished_before_a_malformed_line_serves_once_it_is_mended(
    corpus, sentences, tokenizer_path, tmp_path, many_shards, write_jsonl
):
    second = tmp_path / "second.jsonl"
    second.write_bytes(b'{"text": "fox"}\n{')
    with pytest.raises(UserError, match=r"second\.jsonl:2: byte 17: invalid JSON"):
        preprocess([corpus, second], tokenizer_path, tmp_path / "data", workers=1)
    write_jsonl(second, ["fox", "dog"])
    report = preprocess([corpus, second], tokenizer_path, tmp_path / "data", workers=1)
    assert 0 < report.new_text_bytes < corpus.stat().st_size
    assert report.text_bytes == corpus.stat().st_size + second.stat().st_size
    preprocess([corpus, second], tokenizer_path, tmp_path / "clean", workers=1)
    assert outputs(tmp_path / "data") == outputs(tmp_path / "clean")


def test_a_failed_run_without_a_finished_shard_leaves_nothing(tokenizer_path, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"a\.jsonl:1: "):
        preprocess([tmp_path / "a.jsonl"], tokenizer_path, tmp_path / "out" / "data", workers=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_lines_are_counted_anew_in_every_file(corpus, tokenizer_path, tmp_path, many_shards):
    (tmp_path / "second.jsonl").write_bytes(b"\n" * 1000 + b"{")
    with pytest.raises(UserError, match=r"second\.jsonl:1001: byte 1001: invalid JSON"):
        preprocess([corpus, tmp_path / "second.jsonl"], tokenizer_path, tmp_path / "data", workers=1)


def test_malformed_lines_are_left_out_and_counted(
    corpus, sentences, tokenizer_path, tmp_path, many_shards, write_jsonl
):
    lines = corpus.read_bytes().splitlines()
    for place in range(20):
        lines[place * 15] = b"{" if place % 2 else b'{"text": ""}'
    corpus.write_bytes(b"\n".join(lines))
    good = [text for place, text in enumerate(sentences) if place % 15]
    clean = write_jsonl(tmp_path / "clean.jsonl", good + good)
    preprocess([clean], tokenizer_path, tmp_path / "clean" / "data", workers=1)
    for workers in (1, 2):
        prefix = tmp_path / "skipped" / "data"
        report = preprocess([corpus, corpus], tokenizer_path, prefix, workers=workers, on_error="skip")
        assert tokens_and_index(prefix) == tokens_and_index(tmp_path / "clean" / "data")
        assert (report.skipped, report.empty) == (20, 20)
        assert len(report.problems) == 10
        assert report.problems[0] == f"{corpus}:1: byte 0: an empty document"
        assert report.problems[1].startswith(f"{corpus}:16: byte ")
        sidecar = IndexedDataset(prefix).sidecar
        assert sidecar is not None
        assert (sidecar.skipped, sidecar.empty) == (20, 20)


def test_shards_that_left_something_out_are_made_anew_where_nothing_may_be(
    corpus, tokenizer_path, tmp_path, many_shards
):
    corpus.write_bytes(b"{\n" + corpus.read_bytes())
    (tmp_path / "late.jsonl").write_bytes(b"")

    def stop(done: int, total: int, tokens: int) -> None:
        if done > total / 2:
            raise UserError("enough")

    with pytest.raises(UserError, match=r"enough; finished shards stay"):
        preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1, on_error="skip", progress=stop)
    with pytest.raises(UserError, match=r"corpus\.jsonl:1: byte 1: invalid JSON"):
        preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1)


def test_documents_without_tokens_are_empty_also_where_they_hold_text(tmp_path, write_jsonl):
    # This tokenizer knows no spaces and has no token for what it does not know.
    model = {"type": "BPE", "vocab": {"a": 0, "<|endoftext|>": 1}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    path = write_jsonl(tmp_path / "a.jsonl", ["a", " ", "aa"])
    with pytest.raises(
        UserError,
        match=r"a\.jsonl:2: byte 14: an empty document to the tokenizer, which makes no token of its text; mend",
    ):
        preprocess([path], tmp_path, tmp_path / "data", append_eod=True, workers=1)
    report = preprocess([path], tmp_path, tmp_path / "data", append_eod=True, workers=1, on_error="skip")
    assert (report.documents, report.empty) == (2, 1)


def test_short_documents_are_left_out_and_counted(corpus, sentences, tokenizer_path, tmp_path):
    report = preprocess([corpus], tokenizer_path, tmp_path / "data", append_eod=True, min_tokens=12, workers=1)
    lengths = [len(ids) for ids in load_tokenizer(tokenizer_path).encode_batch(sentences)]
    kept = [length + 1 for length in lengths if length >= 12]
    assert 0 < len(kept) < 300
    dataset = IndexedDataset(tmp_path / "data")
    assert [len(dataset.document_tokens(i)) for i in range(dataset.num_documents)] == kept
    assert report.short == 300 - len(kept)
    assert dataset.sidecar is not None
    assert dataset.sidecar.short == report.short


@pytest.mark.parametrize("buckets", [1, 7])
def test_of_equal_documents_the_first_stays(tokenizer_path, tmp_path, write_jsonl, many_shards, monkeypatch, buckets):
    generator = np.random.default_rng(0)
    texts = [f"the fox {number} jumps" for number in generator.integers(0, 120, size=400)]
    monkeypatch.setattr(deduplicate, "_BUCKET_BYTES", 400 * 24 // buckets + 1)
    monkeypatch.setattr(deduplicate, "_BLOCK", 33)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    report = preprocess([path], tokenizer_path, tmp_path / "data", dedup=True, append_eod=True, workers=1)
    first = list(dict.fromkeys(texts))
    assert texts_of(tmp_path / "data", tokenizer_path) == first
    assert report.duplicates == 400 - len(first)
    preprocess([write_jsonl(tmp_path / "b.jsonl", first)], tokenizer_path, tmp_path / "b", append_eod=True, workers=1)
    assert tokens_and_index(tmp_path / "data") == tokens_and_index(tmp_path / "b")
    ours, theirs = IndexedDataset(tmp_path / "data").sidecar, IndexedDataset(tmp_path / "b").sidecar
    assert ours is not None
    assert theirs is not None
    assert (ours.token_counts_entropy, ours.max_token_id) == (theirs.token_counts_entropy, theirs.max_token_id)


@pytest.mark.parametrize(("bucket_bytes", "most"), [(1 << 26, 4096), (200, 4096), (200, 3)])
def test_shuffled_documents_are_the_same_documents(
    corpus, sentences, tokenizer_path, tmp_path, many_shards, monkeypatch, bucket_bytes, most
):
    monkeypatch.setattr(merge_shards, "_BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(merge_shards, "_MOST_BUCKETS", most)
    orders = []
    for seed in (1, 1, 2):
        preprocess([corpus], tokenizer_path, tmp_path / "data", document_shuffle=seed, workers=1)
        orders.append(texts_of(tmp_path / "data", tokenizer_path))
        assert sorted(orders[-1]) == sorted(sentences)
    assert orders[0] == orders[1] != orders[2]
    places = np.array([sentences.index(text) for text in orders[0]])
    assert abs(np.corrcoef(places, np.arange(300))[0, 1]) < 0.2
    sidecar = IndexedDataset(tmp_path / "data").sidecar
    assert sidecar is not None
    assert sidecar.document_shuffle == 2


def test_every_order_of_shuffled_documents_is_as_likely_as_any_other(
    tokenizer_path, tmp_path, write_jsonl, monkeypatch
):
    monkeypatch.setattr(merge_shards, "_BUCKET_BYTES", 8)
    path = write_jsonl(tmp_path / "a.jsonl", ["fox", "dog", "box"])
    seen = Counter()
    for seed in range(300):
        preprocess([path], tokenizer_path, tmp_path / "data", document_shuffle=seed, workers=1)
        seen[(tmp_path / "data.bin").read_bytes()] += 1
    assert len(seen) == 6
    assert all(20 < count < 80 for count in seen.values())  # 50 each, more than four standard deviations


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


def test_other_keys_are_read(tmp_path, tokenizer_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1, "title": "quick", "content": "fox"}\n')
    for key, text in (("content", "fox"), (["title", "content"], "quick\nfox")):
        preprocess([tmp_path / "a.jsonl"], tokenizer_path, tmp_path / "data", text_key=key, workers=1)
        assert texts_of(tmp_path / "data", tokenizer_path) == [text]


def test_another_token_ends_documents(corpus, tokenizer_path, tmp_path):
    preprocess([corpus], tokenizer_path, tmp_path / "data", eod_token="<s>", workers=1)
    dataset = IndexedDataset(tmp_path / "data")
    assert {int(dataset.document_tokens(i)[-1]) for i in range(300)} == {1}
    assert dataset.sidecar is not None
    assert dataset.sidecar.eod_id == 1


def test_a_document_longer_than_is_encoded_at_once_has_the_same_tokens(
    tokenizer_path, tmp_path, sentences, monkeypatch
):
    from megalite.data.preprocess import encode_shard, long_text, readers

    text = "".join(sentences) * 3
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    for name in ("whole", "parts"):
        for path in (tmp_path / "a.txt", tmp_path / "b.jsonl"):
            prefix = tmp_path / name / path.name[0]
            preprocess([path], tokenizer_path, prefix, append_eod=True, dedup=True, workers=1)
        for module in (long_text, readers):
            monkeypatch.setattr(module, "LONGEST_WHOLE", 4000)
        monkeypatch.setattr(long_text, "PART", 2000)
    for name in ("a", "b"):
        assert outputs(tmp_path / "whole" / name) == outputs(tmp_path / "parts" / name)
    with pytest.raises(UserError, match="not one document is left"):
        preprocess([tmp_path / "a.txt"], tokenizer_path, tmp_path / "c", min_tokens=1_000_000, workers=1)
    monkeypatch.setattr(encode_shard, "_MOST_TOKENS", 1000)
    with pytest.raises(
        UserError, match=r"a\.txt:1: byte 0: a document of [\d,]+ tokens; an index holds up to 999; cut it"
    ):
        preprocess([tmp_path / "a.txt"], tokenizer_path, tmp_path / "c", workers=1)
    report = preprocess(
        [tmp_path / "a.txt", corpus_of(tmp_path)], tokenizer_path, tmp_path / "c", on_error="skip", workers=1
    )
    assert (report.documents, report.skipped) == (1, 1)
    assert texts_of(tmp_path / "c", tokenizer_path) == ["fox"]


def corpus_of(folder: Path) -> Path:
    (folder / "fox.jsonl").write_text('{"text": "fox"}\n')
    return folder / "fox.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "skp"}, r"--on-error=skp; did you mean 'skip'"),
        ({"workers": 0}, r"--workers=0: allowed are 1 and more"),
        ({"min_tokens": -1}, r"--min-tokens=-1: allowed are 0 and more"),
        ({"document_shuffle": -1}, r"--document-shuffle=-1: a seed is 0 to 4294967295"),
        ({"eod_token": "<S>"}, r"--eod-token=<S>: .*tok\.model has no such token; did you mean '<s>'"),
        ({"chat": "plain", "text_key": ["a", "b"]}, r"--text-key=a,b: a conversation stands under one key"),
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
    with pytest.raises(UserError, match="not one document is left to write"):
        preprocess([path], tokenizer_path, tmp_path / "data", on_error="skip")
    assert not list(tmp_path.glob("data*"))


def test_files_without_a_record_are_named(tmp_path, tokenizer_path, write_jsonl):
    names = {"a.jsonl": b"", "b.jsonl": b"\n \n", "c.json": b"[ ]", "d.jsonl.gz": gzip.compress(b"")}
    for name, content in names.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in names]
    for file in files:
        with pytest.raises(UserError) as raised:
            preprocess([file], tokenizer_path, tmp_path / "data")
        assert str(raised.value).startswith(str(file))
        assert "no record" in str(raised.value)
        assert "give input" in str(raised.value)
    with pytest.raises(UserError, match=r"a\.jsonl \(0 bytes\), .*b\.jsonl, .*c\.json and 1 more: hold no record"):
        preprocess(files, tokenizer_path, tmp_path / "data")
    assert not list(tmp_path.glob("data*"))

    long = write_jsonl(tmp_path / "long.jsonl", ["the fox jumps\n" * 90_000, "fox"])  # more than a segment
    for run in ("once", "again"):
        report = preprocess([long, *files[:2]], tokenizer_path, tmp_path / run)
        assert report.documents == 2
        assert [note for note in report.notes if "no record" in note] == [
            f"{files[0]} (0 bytes), {files[1]}: hold no record"
        ]


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_reaches_the_total(corpus, tokenizer_path, tmp_path, many_shards, workers):
    told = []
    report = preprocess(
        [corpus], tokenizer_path, tmp_path / "data", workers=workers, progress=lambda *now: told.append(now)
    )
    size = corpus.stat().st_size
    assert told == sorted(told)
    assert told[-1] == (size, size, report.tokens)


def processes_below(process: psutil.Process, word: str = "") -> list[psutil.Process]:
    def counts(child: psutil.Process) -> bool:
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:  # it has ended meanwhile
            return False
        return word in command and "resource_tracker" not in command

    return [child for child in process.children(recursive=True) if counts(child)]


def test_a_killed_worker_is_an_error(corpus, tokenizer_path, tmp_path, many_shards):
    def kill_workers(done: int, total: int, tokens: int) -> None:
        for worker in processes_below(psutil.Process(), "spawn_main"):
            worker.kill()

    with pytest.raises(UserError, match="a worker process was killed"):
        preprocess([corpus], tokenizer_path, tmp_path / "data", workers=2, progress=kill_workers)
    assert not list(tmp_path.glob("data.*[!k]"))


SLOW_RUN = f"""
import sys, time
from contextlib import contextmanager
from functools import partial
from megalite import cli
from megalite.data.preprocess import preprocess
from megalite.data.preprocess import inputs

@contextmanager
def slowly(description):
    yield lambda *_: time.sleep(0.2)

if __name__ == "__main__":
    preprocess.shards = partial(inputs.shards, shard_bytes={SHARD_BYTES})
    cli.preprocess.token_progress = slowly
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def slow_run(corpus, tokenizer_path, tmp_path):
    """Start a run that takes its time; comes back once some shards are finished, with all its processes."""
    script = tmp_path / "run.py"
    script.write_text(SLOW_RUN)
    started: list[psutil.Process] = []

    def start(workers: int) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
        command = [sys.executable, str(script), "preprocess", str(corpus), "--tokenizer", str(tokenizer_path)]
        command += ["--output", str(tmp_path / "data"), "--workers", str(workers), "--append-eod"]
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(psutil.Process(parent.pid))
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("data.work/*.json"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        processes = [started[0], *processes_below(started[0])]
        started.extend(processes[1:])
        return parent, processes

    yield start
    for process in started:
        if process.is_running():
            process.kill()


def finish(corpus: Path, tokenizer_path: Path, folder: Path, workers: int) -> None:
    """Complete an interrupted run, and see that it is as if nothing had happened."""
    report = preprocess([corpus], tokenizer_path, folder / "data", workers=workers, append_eod=True)
    assert 0 < report.new_text_bytes < report.text_bytes == corpus.stat().st_size
    preprocess([corpus], tokenizer_path, folder / "at-once", workers=1, append_eod=True)
    assert outputs(folder / "data") == outputs(folder / "at-once")


@pytest.mark.parametrize(("workers", "then"), [(1, 2), (2, 1)])
def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    corpus, tokenizer_path, tmp_path, slow_run, many_shards, workers, then
):
    parent, processes = slow_run(workers)
    assert len(processes) >= workers
    for process in processes:
        process.kill()
    parent.wait()
    psutil.wait_procs(processes, timeout=20)
    assert [path.name for path in tmp_path.glob("data*")] == ["data.work"]
    finish(corpus, tokenizer_path, tmp_path, then)


def test_workers_do_not_outlive_a_killed_parent(slow_run):
    parent, (_, *workers) = slow_run(2)
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 2)])
def test_an_interrupted_run_says_how_to_go_on(corpus, tokenizer_path, tmp_path, slow_run, many_shards, number, workers):
    parent, processes = slow_run(workers)
    for process in processes:  # as a terminal does, and many a scheduler
        process.send_signal(number)
    _, error = parent.communicate(timeout=60)
    assert parent.returncode == 128 + number
    folder = tmp_path / "data.work"
    assert error == (
        f"megalite: interrupted; finished shards stay in {folder}: the same command again goes on from there\n"
    )
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    assert [path.name for path in tmp_path.glob("data*")] == ["data.work"]
    finish(corpus, tokenizer_path, tmp_path, 1)


def test_two_runs_for_one_output_refuse_each_other(corpus, tokenizer_path, tmp_path, slow_run, many_shards):
    slow_run(1)
    with pytest.raises(UserError, match=r"data\.work: held by another run that writes the same output; wait for it"):
        preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1)
    preprocess([corpus], tokenizer_path, tmp_path / "other", workers=1)


class Stop(Exception):
    pass


@pytest.mark.parametrize("change", ["nothing", "time", "text", "option", "shard", "cut"])
def test_shards_made_from_anything_else_are_made_anew(
    corpus, sentences, tokenizer_path, tmp_path, many_shards, change, write_jsonl
):
    def stop(done: int, total: int, tokens: int) -> None:
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1, progress=stop)
    options = {}
    if change == "time":
        os.utime(corpus, ns=(1, 1))
    elif change == "text":
        write_jsonl(corpus, ["dog", *sentences])
    elif change == "option":
        options["min_tokens"] = 6
    elif change == "shard":
        for path in (tmp_path / "data.work").glob("*.bin"):
            path.write_bytes(path.read_bytes()[:-1])
    elif change == "cut":
        many_shards(700)
    report = preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1, **options)
    assert (report.new_text_bytes < report.text_bytes) == (change == "nothing")
    preprocess([corpus], tokenizer_path, tmp_path / "clean", workers=1, **options)
    assert outputs(tmp_path / "data") == outputs(tmp_path / "clean")


def test_memory_does_not_grow_with_the_input(tokenizer_path, tmp_path, sentences):
    script = tmp_path / "run.py"
    script.write_text(
        "import re, sys\n"
        "from pathlib import Path\n"
        "from megalite.data.preprocess.preprocess import preprocess\n"
        "folder, tokenizer = map(Path, sys.argv[1:])\n"
        "for name in ('small', 'large'):\n"
        "    for suffix in ('jsonl', 'jsonl.gz', 'parquet', 'txt'):\n"
        "        preprocess([folder / f'{name}.{suffix}'], tokenizer, folder / 'data', workers=1, dedup=True,\n"
        "                   document_shuffle=1, append_eod=True)\n"
        # The largest resident size so far; getrusage would count that of the process that started this one.
        "    print(re.search(r'VmHWM:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
    )
    text = "".join(sentences)
    for name, size in (("small", 4_000_000), ("large", 24_000_000)):
        texts = [f"{number} {text}" for number in range(size // len(text))]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
        # One row group and one document: nothing to cut at.
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / f"{name}.parquet", compression="none")
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    command = [sys.executable, str(script), str(tmp_path), str(tokenizer_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = (int(line) / 1024 for line in done.stdout.split())
    assert large < small + 60
    assert large < 250


def test_conversations_get_a_loss_mask(tokenizer_path, tmp_path, many_shards):
    from megalite.data.chat.chat_template import load_chat_template

    conversations = [
        [{"role": "user", "content": f"the fox {n}"}, {"role": "assistant", "content": f"jumps {n} times"}]
        for n in range(40)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
    template, tokenizer = load_chat_template("plain"), load_tokenizer(tokenizer_path)
    for workers, options in ((1, {}), (2, {}), (1, {"document_shuffle": 1, "dedup": True})):
        prefix = tmp_path / "data"
        preprocess([path, path], tokenizer_path, prefix, chat="plain", workers=workers, append_eod=True, **options)
        dataset = IndexedDataset(prefix)
        assert dataset.has_loss_mask
        found = []
        for document in range(dataset.num_documents):
            start, end = dataset.document_span(document)
            found.append((dataset.tokens(start, end - start).tolist(), dataset.loss_mask(start, end - start).tolist()))
        expected = []
        for turns in conversations:
            ids, mask = template.encode(turns, tokenizer)
            assert 0 < mask.sum() < len(mask)
            expected.append(([*ids.tolist(), 2], [*mask.tolist(), 0]))
        if options:
            assert sorted(found) == sorted(expected)
        else:
            assert found == expected * 2
    path.write_text(json.dumps({"messages": "hello"}) + "\n")
    with pytest.raises(UserError, match=r"chat\.jsonl:1: byte 0: "):
        preprocess([path], tokenizer_path, tmp_path / "bad", chat="plain", workers=1)


def test_the_tool_takes_the_options_of_megatron(corpus, tokenizer_path, tmp_path):
    tool = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
    command = [sys.executable, str(tool), "--input", str(corpus), "--tokenizer-model", str(tokenizer_path)]
    command += ["--output-prefix", str(tmp_path / "my"), "--append-eod", "--workers", "1"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--partitions", "1", "--log-interval", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "300 documents" in done.stdout
    assert IndexedDataset(tmp_path / "my_text_document").num_documents == 300
    failed = subprocess.run([*command, "--json-keys", "body"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"megalite: error: {corpus}:1: byte 0: no key 'body'")
    assert failed.stderr.count("\n") == 1


REFUSING = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    "model": {"type": "Unigram", "unk_id": None, "vocab": [["\u2581", -1.0], ["a", -2.0], ["b", -2.0], ["\n", -3.0]]},
}
"""A tokenizer that raises over every other letter."""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["u.jsonl", "u.txt", "long.txt", "chat.jsonl"])
def test_a_text_that_the_tokenizer_refuses_is_malformed(tmp_path, name, workers, monkeypatch, write_jsonl, many_shards):
    many_shards(12)
    (tmp_path / "tokenizer.json").write_text(json.dumps(REFUSING))
    texts: list[str] = ["a b", "a 日本", "b", "c"]
    options: dict[str, Any] = {}
    path = tmp_path / name
    if name == "chat.jsonl":
        turns = [{"messages": [{"role": "assistant", "content": text}]} for text in texts]
        path.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
        (tmp_path / "template.yaml").write_text("roles: {assistant: {suffix: a}}")
        options["chat"] = str(tmp_path / "template.yaml")
    elif name == "u.jsonl":
        write_jsonl(path, texts)
    else:
        path.write_text("\n".join(texts))
        options["split_lines"] = name == "u.txt"
    if name == "long.txt":
        monkeypatch.setattr("megalite.data.preprocess.readers.LONGEST_WHOLE", 4)
        monkeypatch.setattr("megalite.data.preprocess.long_text.LONGEST_WHOLE", 4)
        monkeypatch.setattr("megalite.data.preprocess.long_text.PART", 2)
        (tmp_path / "good.txt").write_text("a\nb\na\nb")
    line = 1 if name == "long.txt" else 2
    where = rf"{name}:{line}: byte \d+: the tokenizer refuses this text: .*unk_id"
    with pytest.raises(UserError, match=where):
        preprocess([path], tmp_path / "tokenizer.json", tmp_path / "data", workers=workers, **options)
    inputs_ = [path, tmp_path / "good.txt"] if name == "long.txt" else [path]
    report = preprocess(
        inputs_, tmp_path / "tokenizer.json", tmp_path / "data", workers=workers, on_error="skip", **options
    )
    assert (report.documents, report.skipped) == ((1, 1) if name == "long.txt" else (2, 2))
    assert "the tokenizer refuses this text" in report.problems[0]


def test_a_token_begins_every_document(corpus, sentences, tokenizer_path, tmp_path, monkeypatch):
    wanted: list[dict[str, Any]] = [{"prepend_bos": True}, {"bos_token": "<s>"}]
    for options in wanted:
        preprocess([corpus], tokenizer_path, tmp_path / "data", append_eod=True, workers=1, **options)
        dataset = IndexedDataset(tmp_path / "data")
        expected = [[1, *ids, 2] for ids in load_tokenizer(tokenizer_path).encode_batch(sentences)]
        assert [dataset.document_tokens(i).tolist() for i in range(dataset.num_documents)] == expected
        sidecar = dataset.sidecar
        assert sidecar is not None
        found = (sidecar.bos_id, sidecar.bos_token, sidecar.eod_id, sidecar.eod_token)
        assert found == (1, "<s>", 2, "<|endoftext|>")
        dataset.verify()
    # Whether a document is short does not hang on it, and one that is long gets it too.
    (tmp_path / "a.txt").write_text("the quick brown fox\njumps over the lazy dog")
    whole = load_tokenizer(tokenizer_path).encode((tmp_path / "a.txt").read_text())
    for longest in (1 << 20, 10):
        monkeypatch.setattr("megalite.data.preprocess.readers.LONGEST_WHOLE", longest)
        with pytest.raises(UserError, match="1 shorter"):
            preprocess(
                [tmp_path / "a.txt"], tokenizer_path, tmp_path / "b", prepend_bos=True, workers=1,
                min_tokens=len(whole) + 1,
            )  # fmt: skip
        preprocess([tmp_path / "a.txt"], tokenizer_path, tmp_path / "b", prepend_bos=True, workers=1)
        assert IndexedDataset(tmp_path / "b").document_tokens(0).tolist() == [1, *whole]


def test_a_conversation_begins_with_a_token_once(tmp_path, tokenizer_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "the fox"}]}\n')
    template = tmp_path / "template.yaml"
    template.write_text("roles: {assistant: {prefix: x}}\n")
    preprocess([path], tokenizer_path, tmp_path / "data", chat=str(template), prepend_bos=True, workers=1)
    dataset = IndexedDataset(tmp_path / "data")
    assert (dataset.tokens(0, 1).tolist(), dataset.loss_mask(0, 1).tolist()) == ([1], [0])
    template.write_text("roles: {assistant: {prefix: x}}\nstart: <s>\ncontrol_tokens: [<s>]")
    with pytest.raises(UserError, match=r"--prepend-bos: the chat template .* begins with '<s>' already"):
        preprocess([path], tokenizer_path, tmp_path / "data", chat=str(template), prepend_bos=True, workers=1)


def edges_tokenizer(folder, **config) -> Path:
    """A tokenizer whose tokens for the edges of documents have names of their own."""
    added = [
        {"id": 2 + at, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for at, name in enumerate(("<|begin|>", "<|fin|>"))
    ]  # fmt: skip
    model = {"type": "BPE", "vocab": {"a": 0, "?": 1}, "merges": [], "unk_token": "?"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": added}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokens_of_the_edges_are_those_that_tokenizer_config_names(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", ["aa", "aaa"])
    named = {"eos_token": "<|fin|>", "bos_token": {"content": "<|begin|>"}}
    folder = edges_tokenizer(tmp_path, **named)
    report = preprocess([path], folder, tmp_path / "data", append_eod=True, prepend_bos=True, workers=1)
    assert IndexedDataset(tmp_path / "data").document_tokens(0).tolist() == [2, 0, 0, 3]
    assert report.notes == ()
    edges_tokenizer(tmp_path, **named, add_bos_token=True)
    report = preprocess([path], folder, tmp_path / "data", workers=1)
    assert report.notes == (
        f"{folder}: puts '<|begin|>' before a text, and these documents have none; --prepend-bos puts it before each",
    )
    edges_tokenizer(tmp_path, eos_token="<|none|>")
    for option in ("append_eod", "prepend_bos"):
        flag = f"--{option.replace('_', '-')}"
        options: dict[str, Any] = {option: True}
        with pytest.raises(UserError, match=f"has no (end-of-document|beginning) token for {flag}; name one with --"):
            preprocess([path], folder, tmp_path / "data", workers=1, **options)


def test_letters_that_the_tokenizer_does_not_know_are_told(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", ["abca", "日本"])
    report = preprocess([path], edges_tokenizer(tmp_path), tmp_path / "data", workers=1)
    (note,) = report.notes
    assert note.startswith("4 tokens (66.67%) are '?', which stands for what")


def test_keys_of_conversations_that_are_passed_over_are_counted(tmp_path, tokenizer_path, many_shards):
    answer = {"role": "assistant", "content": "the fox", "name": "joe"}
    records = [{"messages": [answer], "id": n, **({"tools": [{"name": "f"}]} if n % 3 else {})} for n in range(30)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(
        UserError, match=r"chat\.jsonl:2: .*tools: the template plain has no place for it; .*--ignore-key"
    ):
        preprocess([path], tokenizer_path, tmp_path / "data", chat="plain", workers=1)
    for workers in (1, 2):
        report = preprocess(
            [path], tokenizer_path, tmp_path / "data", chat="plain", workers=workers, ignore_key=["tools"], dedup=True
        )
        sidecar = IndexedDataset(tmp_path / "data").sidecar
        assert sidecar is not None
        assert report.ignored == sidecar.ignored == {"id": 30, "name": 30, "tools": 20}
        # They differ in what is not read alone.
        assert (report.documents, report.duplicates) == (1, 29)
    with pytest.raises(UserError, match="--ignore-key=id: is for conversations; give --chat TEMPLATE"):
        preprocess([path], tokenizer_path, tmp_path / "data", ignore_key=["id"])


def test_only_what_is_to_be_overwritten_is(corpus, tokenizer_path, tmp_path):
    preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1, overwrite=False)
    before = outputs(tmp_path / "data")
    for suffix in (".idx", ".bin", ".json"):
        with pytest.raises(UserError, match=rf"data\{suffix}: is there already; give another --output, or overwrite"):
            preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1, overwrite=False)
        assert suffix in outputs(tmp_path / "data")
        (tmp_path / f"data{suffix}").unlink()
    preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1, overwrite=False)
    assert outputs(tmp_path / "data") == before
    preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1, overwrite=True)


@pytest.mark.parametrize("published", [[], [".bin"], [".bin", ".json"]])
def test_a_killed_run_goes_on_without_overwriting(corpus, tokenizer_path, tmp_path, many_shards, published):
    def stop(done: int, total: int, tokens: int) -> None:
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1, progress=stop)
    for suffix in published:  # as where it is killed while finished files get their names
        (tmp_path / f"data{suffix}").write_bytes(b"")
    report = preprocess([corpus], tokenizer_path, tmp_path / "data", workers=1, overwrite=False)
    assert report.new_text_bytes < report.text_bytes
    preprocess([corpus], tokenizer_path, tmp_path / "clean", workers=1)
    assert outputs(tmp_path / "data") == outputs(tmp_path / "clean")


@pytest.mark.parametrize("overwrite", [True, False])
def test_no_input_is_overwritten(sentences, tokenizer_path, tmp_path, overwrite, write_jsonl):
    for name in ("corpus.json", "link.json"):
        path = tmp_path / name
        if name == "link.json":
            path.symlink_to(tmp_path / "corpus.json")
        else:
            write_jsonl(path, sentences)
        with pytest.raises(UserError, match=rf"{name}: would be overwritten by --output .*; give another --output"):
            preprocess([path], tokenizer_path, path.with_suffix(""), workers=1, overwrite=overwrite)


def test_where_nothing_is_left_the_malformed_are_told(tmp_path, tokenizer_path):
    (tmp_path / "a.jsonl").write_text('{\n{"text": ""}\n')
    with pytest.raises(UserError) as caught:
        preprocess([tmp_path / "a.jsonl"], tokenizer_path, tmp_path / "data", on_error="skip", workers=1)
    message = str(caught.value)
    assert "1 malformed, 0 shorter than --min-tokens, 1 empty; the first: " in message
    assert f"{tmp_path}/a.jsonl:1: byte 1: invalid JSON" in message
    assert message.endswith("mend the malformed ones")


def test_an_array_gives_the_documents_of_its_lines(corpus, tokenizer_path, tmp_path, many_shards):
    array = tmp_path / "array.json"
    array.write_text(json.dumps([json.loads(line) for line in corpus.read_text().splitlines()], indent=1))
    preprocess([corpus], tokenizer_path, tmp_path / "lines", workers=1)
    for workers in (1, 2):
        report = preprocess([array], tokenizer_path, tmp_path / "data", workers=workers)
        assert tokens_and_index(tmp_path / "data") == tokens_and_index(tmp_path / "lines")
        assert report.text_bytes > corpus.stat().st_size


def test_workers_are_given_a_tokenizer_behind_a_link_by_its_own_name(corpus, tmp_path, monkeypatch):
    (tmp_path / "blob").write_text(json.dumps(REFUSING))
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "blob")
    given = []

    def workers(tasks, recipe, coder, coder_files, *_):
        given.append(coder_files.tokenizer)
        raise Stop
        yield

    monkeypatch.setattr(preprocess_module, "encode_in_workers", workers)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stop):
        preprocess([corpus], Path("tokenizer.json"), tmp_path / "data", workers=2)
    assert given == [tmp_path / "tokenizer.json"]


def test_the_tool_takes_megatrons_options_of_gpt2(corpus, tmp_path, monkeypatch, capsys):
    tool = runpy.run_path(str(Path(__file__).parents[3] / "tools" / "preprocess_data.py"))
    letters = [*map(chr, range(33, 127)), "\u0120", "\u010a", "<|endoftext|>"]
    (tmp_path / "gpt2-vocab.json").write_text(json.dumps({letter: at for at, letter in enumerate(letters)}))
    (tmp_path / "gpt2-merges.txt").write_text("#version: 0.2\n")
    files = ["--vocab-file", str(tmp_path / "gpt2-vocab.json"), "--merge-file", str(tmp_path / "gpt2-merges.txt")]

    def run(*words: str) -> tuple[int, str]:
        argv = ["preprocess_data.py", "--input", str(corpus), "--output-prefix", str(tmp_path / "my"), "--workers=1"]
        monkeypatch.setattr(sys, "argv", [*argv, *words])
        return tool["main"](), capsys.readouterr().err

    command = ("--tokenizer-type", "GPT2BPETokenizer", *files, "--append-eod")
    assert run(*command) == (0, "")
    dataset = IndexedDataset(tmp_path / "my_text_document")
    assert dataset.sidecar is not None
    assert (dataset.num_documents, dataset.sidecar.eod_token) == (300, "<|endoftext|>")
    for words, reason in (
        (command, "is there already"),
        ((*files[:2], "--force"), "no tokenizer is given"),
        ((*files, "--tokenizer-model", "x", "--force"), "keep one tokenizer"),
    ):
        status, told = run(*words)
        assert (status, reason in told) == (2, True), told
    assert run(*command, "--force") == (0, "")
