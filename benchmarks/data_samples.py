"""Samples from a token index: start-up, memory, and random samples a second, Megatron-core beside where installed.

    python benchmarks/data_samples.py

Each line comes from a process of its own. A corpus of 2 million documents and 1e9 tokens is written first (2 GB) and
read once, so that no line waits for the disk; and one of 1e9 documents in sparse files: a valid index in which no
document but the last has a sequence and no sequence but the last a token, so that nothing but its shape is vast.
"""

import multiprocessing
import struct
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.format import HEADER, MAGIC, VERSION
from megalite.data.order.blend import BlendedSamples
from megalite.data.order.megatron import MegatronSamples
from megalite.data.order.permutation import KeyedPermutation
from megalite.data.order.streaming import Samples, StreamingSamples

SEQUENCE_LENGTH = 2048
DOCUMENTS, TOKENS = 2_000_000, 10**9
NUM_SAMPLES = TOKENS // SEQUENCE_LENGTH - 1
VAST_DOCUMENTS, VAST_TOKENS = 10**9, 2 * 10**9
BATCH = 256
SECONDS = 4.0
U16 = 8


def measure() -> str:
    """Return the tables as Markdown; takes two minutes, and 2.1 GB of the temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_corpus(folder / "corpus")
        _write_vast_corpus(folder / "vast")
        starts = [
            ("2M documents, 1e9 tokens: streaming", _apart(_start_streaming, folder / "corpus")),
            ("2M documents, 1e9 tokens: Megatron's order, cold", _apart(_start_megatron, folder)),
            ("2M documents, 1e9 tokens: Megatron's order, cached", _apart(_start_megatron, folder)),
            ("2M documents, 1e9 tokens: Megatron-core, cold", _apart(_start_peer, folder)),
            ("2M documents, 1e9 tokens: Megatron-core, cached", _apart(_start_peer, folder)),
            ("1e9 documents (sparse files): streaming", _apart(_start_streaming, folder / "vast")),
        ]
        rates = [
            (f"streaming, a whole epoch in its order, for the first time, batches of {BATCH}", _apart(_epoch, folder)),
            (f"streaming, batches of {BATCH}", _apart(_read_streaming, folder, BATCH)),
            ("streaming, batches of 1,024", _apart(_read_streaming, folder, 1024)),
            (f"blend of two streams, batches of {BATCH}", _apart(_read_blend, folder)),
            (f"Megatron's order, batches of {BATCH}", _apart(_read_megatron, folder)),
            ("Megatron-core's GPTDataset, tokens only", _apart(_read_peer, folder, True)),
            ("Megatron-core's GPTDataset, whole items", _apart(_read_peer, folder, False)),
            ("the permutation alone, n = 1e12, arrays of 1,024", _apart(_permute, 1024)),
            ("the permutation alone, n = 1e12, arrays of 65,536", _apart(_permute, 65_536)),
        ]
    lines = [
        "| start-up, with the first 8 samples | ms | memory of its own, MiB | peak with mapped pages, MiB |",
        "|---|---:|---:|---:|",
        *(f"| {what} | {_cells(found)} |" for what, found in starts),
        "",
        f"| one process, random samples of {SEQUENCE_LENGTH:,} + 1 tokens, u16 to int64 | a second |",
        "|---|---:|",
        *(f"| {what} | {'not installed' if rate is None else f'{rate:,.0f}'} |" for what, rate in rates),
    ]
    return "\n".join(lines) + "\n"


def _cells(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "not installed | |"
    seconds, own, peak = found
    return f"{1000 * seconds:,.1f} | {own:,.0f} | {peak:,.0f}"


def _apart(function: Callable[..., Any], *args: object) -> Any:
    """Call in a fresh process, so that one line's memory and caches are not the next one's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def _started(start: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds of a start, MiB that it holds of its own after it, and MiB at most with the mapped pages of files."""
    own, peak = _memory("RssAnon"), _memory("VmRSS")
    began = time.perf_counter()
    held = start()
    seconds = time.perf_counter() - began
    found = seconds, _memory("RssAnon") - own, _memory("VmHWM") - peak
    del held
    return found


def _memory(field: str) -> float:
    """A field of this process's memory in MiB; the peak may lie before, when modules were imported."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:")) / 1024


def _rate(read: Callable[[np.ndarray], object], batch: int, total: int) -> float:
    """Random indices below `total` a second, in batches, over some seconds after as many without a clock."""
    draw = np.random.default_rng(0)
    batches = [draw.integers(0, total, batch) for _ in range(256)]
    _repeat(read, batches)
    done, seconds = _repeat(read, batches)
    return done * batch / seconds


def _repeat(read: Callable[[np.ndarray], object], batches: list[np.ndarray]) -> tuple[int, float]:
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        read(batches[done % len(batches)])
        done += 1
    return done, time.perf_counter() - began


def _streaming(prefix: Path, seed: int = 1) -> Samples:
    return StreamingSamples(IndexedDataset(prefix), sequence_length=SEQUENCE_LENGTH, seed=seed)


def _megatron(folder: Path) -> Samples:
    return MegatronSamples(
        IndexedDataset(folder / "corpus"),
        sequence_length=SEQUENCE_LENGTH,
        seed=1,
        num_samples=NUM_SAMPLES,
        cache_dir=folder / "index",
    )


def _peer(folder: Path) -> Any:
    from megatron.core.datasets import gpt_dataset  # pyright: ignore[reportMissingImports]

    class Tokenizer:
        vocab_size = 50_000
        eod = 0
        unique_identifiers = ("none",)

    prefix = str(folder / "corpus")
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE_LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=cast(Any, Tokenizer()),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(folder / "theirs"),
    )
    documents = np.arange(DOCUMENTS, dtype=np.int32)
    indexed = gpt_dataset.IndexedDataset(prefix)
    return gpt_dataset.GPTDataset(indexed, prefix, documents, NUM_SAMPLES, gpt_dataset.Split.train, config)


def _has_peer() -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            import megatron.core.datasets.gpt_dataset  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def _start_streaming(prefix: Path) -> tuple[float, float, float]:
    return _started(lambda: (samples := _streaming(prefix)).tokens(np.arange(8)) is samples)


def _start_megatron(folder: Path) -> tuple[float, float, float]:
    return _started(lambda: (samples := _megatron(folder)).tokens(np.arange(8)) is samples)


def _start_peer(folder: Path) -> tuple[float, float, float] | None:
    return _started(lambda: [_peer(folder)[index] for index in range(8)]) if _has_peer() else None


def _epoch(folder: Path) -> float:
    samples, began = _streaming(folder / "corpus"), time.perf_counter()
    for start in range(0, NUM_SAMPLES, BATCH):
        samples.tokens(np.arange(start, min(start + BATCH, NUM_SAMPLES)))
    return NUM_SAMPLES / (time.perf_counter() - began)


def _read_streaming(folder: Path, batch: int) -> float:
    return _rate(_streaming(folder / "corpus").tokens, batch, NUM_SAMPLES)


def _read_blend(folder: Path) -> float:
    parts = [_streaming(folder / "corpus", seed) for seed in range(2)]
    return _rate(BlendedSamples(parts, [0.3, 0.7], order="streaming").tokens, BATCH, NUM_SAMPLES)


def _read_megatron(folder: Path) -> float:
    return _rate(_megatron(folder).tokens, BATCH, NUM_SAMPLES)


def _read_peer(folder: Path, tokens_only: bool) -> float | None:
    if not _has_peer():
        return None
    dataset = _peer(folder)
    read = dataset._query_document_sample_shuffle_indices if tokens_only else dataset.__getitem__
    return _rate(lambda indices: [read(index) for index in indices.tolist()], BATCH, NUM_SAMPLES)


def _permute(batch: int) -> float:
    return _rate(KeyedPermutation(10**12, b"key").array, batch, 10**12)


def _write_corpus(prefix: Path) -> None:
    """Documents of 100 to 900 tokens, u16."""
    draw = np.random.default_rng(0)
    changes = draw.integers(-400, 401, DOCUMENTS // 2)
    lengths = TOKENS // DOCUMENTS + np.stack([changes, -changes], axis=1).reshape(-1).astype("<i4")
    with prefix.with_suffix(".bin").open("wb") as file:
        for _ in range(0, TOKENS, 10**7):
            draw.integers(0, 50_000, 10**7, dtype=np.uint16).tofile(file)
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, U16, DOCUMENTS, DOCUMENTS + 1))
        lengths.astype("<i4").tofile(file)
        (2 * (np.cumsum(lengths, dtype="<i8") - lengths)).tofile(file)
        np.arange(DOCUMENTS + 1, dtype="<i8").tofile(file)


def _write_vast_corpus(prefix: Path) -> None:
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(2 * VAST_TOKENS)
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, U16, VAST_DOCUMENTS, VAST_DOCUMENTS + 1))
        file.seek(HEADER.size + 4 * (VAST_DOCUMENTS - 1))
        file.write(struct.pack("<i", VAST_TOKENS))
        file.seek(HEADER.size + 20 * VAST_DOCUMENTS)
        file.write(struct.pack("<q", VAST_DOCUMENTS))


if __name__ == "__main__":
    print(measure())
