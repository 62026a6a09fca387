"""The documents that a step is said to train on are those that it trains on."""

import json
from pathlib import Path

import numpy as np
import pytest
from harness import run_distributed
from training import build_trainer
from typer.testing import CliRunner

from megalite.cli import build_app, main
from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.writer import IndexedDatasetWriter
from megalite.errors import UserError
from megalite.planning.provenance import Provenance

BLEND = (
    "train.batch_size_rampup={start: 2, increment: 2, samples: 6}",
    "parallel.data=2",
    "train.steps=6",
    "data.sequence_length=24",
)


@pytest.fixture
def blend(corpus: Path, tmp_path: Path) -> str:
    """Two sources, one of them small enough to be read several times."""
    writer = IndexedDatasetWriter(tmp_path / "small", np.uint16)
    for document in range(5):
        writer.add_document(np.arange(30 * document, 30 * document + 30, dtype=np.uint16))
    writer.finalize()
    return f"data.train=[{{prefix: {corpus}, weight: 2}}, {{prefix: {tmp_path / 'small'}, weight: 1}}]"


def batches_of_rank(path: str, overrides: list[str], steps: int) -> list[list[list[int]]]:
    """The rows of tokens of every step, as this rank's training reads them."""
    trainer = build_trainer(path, overrides)
    read = []
    for step in range(1, steps + 1):
        rows = [np.column_stack((batch.ids, batch.targets[:, -1:])) for batch in trainer.batches.take(step)]
        read.append(np.concatenate(rows).tolist())
    trainer.close()
    return read


@pytest.mark.parametrize("order", ["streaming", "megatron"])
def test_a_step_trains_on_the_documents_that_are_named(run_file: Path, tmp_path: Path, blend: str, order: str) -> None:
    overrides = [*BLEND, blend, f"data.order={order}"]
    trained = run_distributed(batches_of_rank, 2, str(run_file), overrides, 6)
    text = run_file.read_text()
    (tmp_path / "again.yaml").write_text(text)
    from megalite.planning.plan import prepare

    config = prepare(run_file, overrides, 2).config
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    provenance = Provenance(tmp_path / "run")
    prefixes = set()
    for step in range(1, 7):
        for rank in range(2):
            rows = []
            for seen in provenance.step(step, rank):
                assert seen.data_rank == rank
                parts = []
                for piece in seen.pieces:
                    document = IndexedDataset(piece.prefix).document_tokens(piece.document)
                    parts.append(document[piece.offset : piece.offset + piece.length])
                    prefixes.add(piece.prefix)
                rows.append(np.concatenate(parts).tolist())
            assert rows == trained[rank][step - 1]
    assert len(prefixes) == 2


def test_inspect_says_it_on_the_console(run_file: Path, corpus: Path) -> None:
    result = CliRunner().invoke(build_app(), ["inspect", str(run_file), "--step", "3"])
    lines = result.stdout.splitlines()
    assert lines[0].endswith("samples 8 to 11 of the order streaming, 32 tokens each; seed 5")
    assert [line for line in lines if not line.startswith(" ")][1:] == [
        f"data rank 0, microbatch {n}: sample {8 + n}" for n in range(4)
    ]
    assert all(line.startswith(f"  {corpus} document ") for line in lines if line.startswith(" "))


def test_inspect_writes_json(run_file: Path) -> None:
    result = CliRunner().invoke(build_app(), ["inspect", str(run_file), "--step", "3", "--rank", "0", "--json"])
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["sample"] for record in records] == [8, 9, 10, 11]
    assert all(sum(piece["tokens"] for piece in record["pieces"]) == 33 for record in records)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "is a run; say which step's documents to show: --step N"),
        (["--step", "1", "--plot", "a.png"], "--plot: "),
        (["--step", "-1"], "--step=-1: the run has steps 1 to 10"),
        (["--step", "0"], "--step=0: the run has steps 1 to 10"),
        (["--step", "11"], "--step=11: the run has steps 1 to 10"),
        (["--step", "1", "--rank", "1"], "--rank=1: the run has ranks 0 to 0"),
    ],
)
def test_a_step_or_rank_that_is_not_there(
    run_file: Path, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(run_file), *options]) == 2
    captured = capsys.readouterr()
    assert problem in captured.err
    assert captured.out == ""


def test_a_path_that_is_neither_dataset_nor_run(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(corpus.parent / "corpsu")]) == 2
    err = capsys.readouterr().err
    assert "neither a dataset's prefix" in err
    assert f"did you mean '{corpus}'?" in err


def test_a_run_whose_data_is_gone(run_file: Path, tmp_path: Path) -> None:
    run_file.write_text(run_file.read_text().replace("corpus/corpus", "corpus/gone"))
    path = tmp_path / "gone.yaml"
    path.write_text(run_file.read_text().replace("prefix: ", "prefix: /nowhere"))
    with pytest.raises(UserError, match="no such file"):
        Provenance(path)
