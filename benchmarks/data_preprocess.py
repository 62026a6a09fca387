"""`megalite preprocess` beside the bare tokenizers and Megatron-core's builder, on 50 MB of real text.

The text is what Python's standard library and the installed packages say about themselves, cut into documents of
about 2 kB. CPU seconds of a whole command, start and all, are compared with those of the tokenizer's fastest call on
texts that are in memory already, in one process without threads.

    python benchmarks/data_preprocess.py
"""

import argparse
import base64
import importlib.util
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
BYTES = 50_000_000
DOCUMENT_CHARACTERS = 2_000
VOCABULARY = 32_000
TRAINING_TEXTS = 4_000
REPEATS = 2
LONG = 4
"""How many times the text scaling is measured on: the third of a second that a command takes to start is no work."""
KINDS = {"sentencepiece": "tok.model", "Hugging Face": "tokenizer.json", "tiktoken": "cl100k_base.tiktoken"}


def main() -> None:
    """Print the table; or, told so by `measure`, be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("bare", "megatron"))
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.part == "bare":
        print(json.dumps(bare(args.tokenizer, args.corpus)))
    elif args.part == "megatron":
        megatron(args.tokenizer, args.corpus, args.output)
    else:
        print(measure())


def measure() -> str:
    """Return the whole comparison as Markdown; takes some minutes."""
    with TemporaryDirectory() as folder:
        corpus, documents, size = write_corpus(Path(folder))
        train_tokenizers(Path(folder), corpus)
        rows = [row(kind, Path(folder) / name, corpus) for kind, name in KINDS.items()]
    head = (
        f"| tokenizer | bare, CPU s | its fastest call | tool, CPU s | tool / bare | tool, MB/s | "
        f"{LONG} times the text: 1 worker, s | 2 workers, s | scaling | Megatron-core, CPU s | Megatron-core / tool |"
    )
    return "\n".join(
        [
            f"`megalite preprocess` of {size / 1e6:.1f} MB in {documents:,} documents of prose from Python packages, "
            f"vocabularies of {VOCABULARY:,}; least of {REPEATS} runs, on {len(os.sched_getaffinity(0))} cores. The "
            "tool's seconds are those of the whole command, bare ones those of the call alone. Megatron-core: json, "
            "the library's tokenizer and `IndexedDatasetBuilder`, document by document, as its preprocess_data.py, "
            "without the start of Python.",
            "",
            head,
            "|" + " --- |" * head.count(" | ") + " --- |",
            *rows,
        ]
    )


def row(kind: str, tokenizer: Path, corpus: Path) -> str:
    """Measure one tokenizer, its processes in turn so that a disturbance meets all."""
    bares, ones, long_ones, long_twos, megatrons = [], [], [], [], []
    for _ in range(REPEATS):
        bares.append(json.loads(part("bare", tokenizer, corpus)))
        ones.append(tool(tokenizer, [corpus], 1))
        long_ones.append(tool(tokenizer, [corpus] * LONG, 1))
        long_twos.append(tool(tokenizer, [corpus] * LONG, 2))
        if importlib.util.find_spec("megatron") is not None:
            output = corpus.with_name("megatron")
            megatrons.append(json.loads(part("megatron", tokenizer, corpus, output).splitlines()[-1]))
    seconds = {call: min(times[call] for times in bares) for call in bares[0]}
    fastest = min(seconds, key=lambda call: seconds[call])
    cpu, wall = min(cpu for cpu, _ in ones), min(wall for _, wall in ones)
    one, two = (min(wall for _, wall in runs) for runs in (long_ones, long_twos))
    theirs = (f"{min(megatrons):.2f}", f"{min(megatrons) / cpu:.1f}") if megatrons else ("not here", "")
    cells = [
        *(kind, f"{seconds[fastest]:.2f}", f"`{fastest}`", f"{cpu:.2f}", f"{cpu / seconds[fastest]:.2f}"),
        *(f"{corpus.stat().st_size / wall / 1e6:.1f}", f"{one:.2f}", f"{two:.2f}"),
        *(f"{one / two:.2f}", *theirs),
    ]
    return f"| {' | '.join(cells)} |"


def tool(tokenizer: Path, corpora: list[Path], workers: int) -> tuple[float, float]:
    """Run the command; return CPU seconds of all its processes, and seconds."""
    command = [sys.executable, "-m", "megalite", "preprocess", *map(str, corpora), "--tokenizer", str(tokenizer)]
    command += ["--output", str(corpora[0].with_name("tool")), "--append-eod", "--workers", str(workers)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started


def part(name: str, tokenizer: Path, corpus: Path, output: Path | None = None) -> str:
    """Run one part of this file in a process of its own; return what it prints."""
    command = [sys.executable, __file__, "--part", name, "--tokenizer", str(tokenizer), "--corpus", str(corpus)]
    command += ["--output", str(output)] if output else []
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    return done.stdout.decode()


def bare(path: Path, corpus: Path) -> dict[str, float]:
    """Return the CPU seconds of each way in which the tokenizer's library encodes a list of texts."""
    texts = list(read(corpus))
    seconds = {}
    for name, call in calls(path).items():
        started = time.process_time()
        call(texts)
        seconds[name] = time.process_time() - started
    return seconds


def calls(path: Path) -> dict[str, Callable[[list[str]], Any]]:
    """Return the ways in which the tokenizer's library encodes a list of texts, the likely fastest."""
    if path.suffix == ".model":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return {"encode(list)": lambda texts: processor.encode(texts, num_threads=1)}
    if path.suffix == ".json":
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        return {"encode_batch_fast": lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False)}
    encoding = load_tiktoken(path)
    return {
        "encode_ordinary": lambda texts: [encoding.encode_ordinary(text) for text in texts],
        "encode_to_numpy": lambda texts: [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts],
        "encode_to_tiktoken_buffer": lambda texts: [
            encoding._core_bpe.encode_to_tiktoken_buffer(text, set()) for text in texts
        ],
    }


def megatron(path: Path, corpus: Path, output: Path) -> None:
    """Print the CPU seconds of Megatron-core's way: a document is read, encoded and added after the other."""
    import torch
    from megatron.core.datasets.indexed_dataset import (  # pyright: ignore[reportMissingImports]
        DType,
        IndexedDatasetBuilder,
    )

    torch.set_num_threads(1)
    encode, vocabulary, eod = plain_encoder(path)
    started = time.process_time()
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(vocabulary))
    for text in read(corpus):
        ids = [*encode(text), eod]
        builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{output}.idx")
    print(time.process_time() - started)


def plain_encoder(path: Path) -> tuple[Callable[[str], list[int]], int, int]:
    """Return the library's function for one text, the size of the vocabulary and the end of document."""
    if path.suffix == ".model":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return processor.encode_as_ids, processor.vocab_size(), processor.eos_id()
    if path.suffix == ".json":
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        return lambda text: tokenizer.encode(text).ids, tokenizer.get_vocab_size(), 0
    encoding = load_tiktoken(path)
    return encoding.encode_ordinary, encoding.n_vocab, encoding.eot_token


def load_tiktoken(path: Path) -> Any:
    """Load ranks by the package itself."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext import openai_public

    openai_public.load_tiktoken_bpe = lambda *_args, **_options: load_tiktoken_bpe(str(path))
    return tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[path.stem]())


def read(corpus: Path) -> Iterator[str]:
    """Yield the texts of a jsonl file as Megatron's tool does."""
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def write_corpus(folder: Path) -> tuple[Path, int, int]:
    """Write the text as jsonl; return the file, its documents and the bytes of text."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    from build_corpus import corpus  # pyright: ignore[reportMissingImports]

    texts = [*corpus(Path(sysconfig.get_path("stdlib"))), *corpus(Path(sysconfig.get_path("purelib")))]
    path, documents, size = folder / "corpus.jsonl", 0, 0
    with path.open("w", encoding="utf-8") as file:
        for document in joined(texts):
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            documents += 1
            size += len(document.encode())
            if size >= BYTES:
                break
    return path, documents, size


def joined(texts: list[str]) -> Iterator[str]:
    """Yield documents of several texts each, without end: in another order and with other neighbours every time."""
    generator = random.Random(1)
    while True:
        generator.shuffle(texts)
        held: list[str] = []
        for text in texts:
            held.append(text)
            if sum(map(len, held)) >= DOCUMENT_CHARACTERS * generator.uniform(0.2, 1.8):
                yield "\n\n".join(held)
                held = []


def train_tokenizers(folder: Path, corpus: Path) -> None:
    """Train one tokenizer of each kind on a part of the text."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    from megalite.data.tokenizers.train_sentencepiece import train_sentencepiece

    texts = [text for text, _ in zip(read(corpus), range(TRAINING_TEXTS), strict=False)]
    part = folder / "part.jsonl"
    part.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    train_sentencepiece([part], vocab_size=VOCABULARY, output=folder / KINDS["sentencepiece"])
    bpe: Any = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(folder / KINDS["Hugging Face"]))
    write_ranks(bpe.get_vocab(with_added_tokens=False), folder / KINDS["tiktoken"])


def write_ranks(vocabulary: dict[str, int], path: Path) -> None:
    """Write a byte-level vocabulary as ranks, filled up to as many as the encoding has."""
    from megalite.data.tokenizers.tiktoken_tokenizer import ENCODINGS

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # Byte-level vocabularies write the other bytes as the letters from U+0100 on.
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    ordered = sorted((name for name in vocabulary if name != "<|endoftext|>"), key=vocabulary.__getitem__)
    ranks = [bytes(letters[letter] for letter in name) for name in ordered]
    missing = ENCODINGS[path.stem].ranks - len(ranks)
    ranks += [b"\xff\xfe" + number.to_bytes(4, "big") for number in range(missing)]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)))


if __name__ == "__main__":
    main()
