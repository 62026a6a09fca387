"""The digest of an order differs where the samples do, and nowhere else."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml

from megalite.config import RunConfig, load_run_config
from megalite.data.datasets import open_datasets
from megalite.data.indexed.writer import IndexedDatasetWriter
from megalite.data.order.digest import order_digest, order_digest_of_before

pytestmark = pytest.mark.slow

Load = Callable[..., RunConfig]


def write_corpus(prefix: Path, seed: int, documents: int = 30) -> None:
    generator = np.random.default_rng(seed)
    writer = IndexedDatasetWriter(prefix, np.dtype(np.uint16))
    for _ in range(documents):
        writer.add_document(generator.integers(0, 300, int(generator.integers(20, 60))).astype(np.uint16))
    writer.finalize()


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a run file over the sources a and b in the working folder, with overrides."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b"), 1):
        write_corpus(tmp_path / name, seed)
    model = {"architecture": "llama", "vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 64}
    train = {"steps": 10, "global_batch_size": 4, "micro_batch_size": 1}
    data = {"sequence_length": 16, "train": [{"prefix": "a"}]}
    content = {"run": {"dir": "run"}, "model": model, "data": data, "train": train}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return lambda *overrides: load_run_config(Path("run.yaml"), overrides).resolve(world_size=None, vocab_size=None)


TWO = "data.train=[{prefix: a, weight: %s}, {prefix: b, weight: %s}]"


def move() -> None:
    """Have the sources elsewhere too, under other names."""
    Path("there").mkdir()
    for name, other in (("a", "c.d"), ("b", "e")):
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{name}{suffix}", f"there/{other}{suffix}")


@pytest.mark.parametrize("order", ["streaming", "megatron"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([], ["data.max_epochs=1"]),
        ([], ["data.train=[{prefix: there/c.d}]"]),
        ([], ["data.train=[{prefix: a, weight: 3}]"]),
        ([TWO % (3, 1)], ["data.train=[{prefix: there/c.d, weight: 3}, {prefix: there/e, weight: 1}]"]),
        ([TWO % (3, 1)], [TWO % (6, 2)]),
        ([TWO % ("0.5", "0.5")], [TWO % (1, 1)]),
        ([], ["data.prefetch=0"]),
        ([], ["data.index_cache=elsewhere"]),
        ([], ["data.reset_attention_mask=true", "data.reset_position_ids=true", "data.eod_mask_loss=true"]),
        ([], ["data.fim_spm_rate=0.25"]),
        ([], ["data.valid=[{prefix: b}]"]),
        (["data.split=[0.8, 0.2]"], ["data.split=[0.8, 0.1, 0.1]"]),
        (["data.split=[0.8, 0.2]"], ["data.split=[8, 2]"]),
        ([], ["train.micro_batch_size=2"]),
    ],
)
def test_what_leaves_the_samples_as_they_are_leaves_the_digest(
    load: Load, order: str, first: list[str], second: list[str]
) -> None:
    move()
    one, other = (load(f"data.order={order}", *overrides) for overrides in (first, second))
    assert (samples(one) == samples(other)).all()
    assert order_digest(one) == order_digest(other)


@pytest.mark.parametrize("order", ["streaming", "megatron"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([], ["run.seed=2"]),
        ([], ["data.train=[{prefix: b}]"]),
        ([], ["data.split=[0.8, 0.2]"]),
        (["data.split=[0.8, 0.2]"], ["data.split=[0.7, 0.3]"]),
        ([TWO % (3, 1)], [TWO % (1, 3)]),
        ([TWO % (1, 1)], ["data.train=[{prefix: b}, {prefix: a}]"]),
        ([], [TWO % (1, 1)]),
    ],
)
def test_what_changes_the_samples_changes_the_digest(
    load: Load, order: str, first: list[str], second: list[str]
) -> None:
    one, other = (load(f"data.order={order}", *overrides) for overrides in (first, second))
    assert (samples(one) != samples(other)).any()
    assert order_digest(one) != order_digest(other)


def test_another_order_or_length_is_another_digest(load: Load) -> None:
    found = [load(), load("data.order=megatron"), load("data.sequence_length=8")]
    assert len(set(map(order_digest, found))) == 3


@pytest.mark.parametrize("sources", ["data.train=[{prefix: a}]", TWO % (3, 1)])
def test_the_number_of_steps_counts_where_megatrons_order_follows_from_it(load: Load, sources: str) -> None:
    """Of any two numbers of steps: the digests are equal just where the first samples are."""
    steps = (2, 5, 15, 20, 25, 30, 36, 38, 45, 60)
    runs = [load("data.order=megatron", f"train.steps={number}", sources) for number in steps]
    same = differ = 0
    for one, other in combinations(runs, 2):
        alike = bool((samples(one, 8) == samples(other, 8)).all())
        assert (order_digest(one) == order_digest(other)) == alike
        same, differ = same + alike, differ + (not alike)
    assert same
    assert differ
    streaming = {order_digest(load(f"train.steps={number}", sources)) for number in steps}
    assert len(streaming) == 1


def samples(config: RunConfig, number: int = 40) -> np.ndarray:
    """The first samples that a run trains on."""
    return open_datasets(config, keep_index=False).train.tokens(np.arange(number))


def test_the_digest_of_before_is_what_it_was(load: Load) -> None:
    config = load("data.split=[0.8, 0.2]", "data.max_epochs=2", TWO % (3, 1))
    data = {
        "sequence_length": 16,
        "train": [{"prefix": "a", "weight": 3.0}, {"prefix": "b", "weight": 1.0}],
        "split": [0.8, 0.2],
        "order": "streaming",
        "max_epochs": 2.0,
        "reset_attention_mask": False,
        "reset_position_ids": False,
        "eod_mask_loss": False,
        "fim_rate": 0.0,
        "fim_spm_rate": 0.5,
        "fim_tokens": None,
    }
    expected = sha256(json.dumps([1234, data], sort_keys=True).encode()).hexdigest()
    assert order_digest_of_before(config) == expected
