"""What is checked before a rank starts: the data against the model, and the run files that ship."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import warm
from rich.console import Console

from megalite.cli import main
from megalite.data.datasets import open_datasets
from megalite.data.indexed.format import DatasetSidecar
from megalite.data.indexed.writer import IndexedDatasetWriter
from megalite.errors import UserError
from megalite.planning.description import describe
from megalite.planning.parameter_count import ParameterCounts
from megalite.planning.plan import prepare
from megalite.planning.preflight import check_data, check_start

ROOT = Path(__file__).parents[2]
RUN_FILES = ["configs/gpt2_124m.yaml", "configs/llama_1b.yaml", "configs/llama_7b.yaml", "configs/llama_70b.yaml"]


def write_corpus(prefix: Path, tokens: np.ndarray, sidecar: DatasetSidecar | None = None) -> None:
    writer = IndexedDatasetWriter(prefix, tokens.dtype)
    writer.add_document(tokens)
    writer.finalize(sidecar)


def spoil_nothing(prefix: Path) -> None:
    """Leave the corpus whole."""


def cut_index(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:-3])


def cut_tokens(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-1])


def remove_index(prefix: Path) -> None:
    Path(f"{prefix}.idx").unlink()


def remove_tokens(prefix: Path) -> None:
    Path(f"{prefix}.bin").unlink()


BAD: list[tuple[str, Callable[[Path], None], list[str], list[str]]] = [
    ("key", spoil_nothing, ["train.stepz=3"], ["train.stepz", "did you mean 'train.steps'?"]),
    ("section", spoil_nothing, ["trian.steps=3"], ["trian.steps", "did you mean 'train.steps'?"]),
    ("deepspeed key", spoil_nothing, ["deepspeed.gradient_cliping=1"], ["gradient_cliping", "'gradient_clipping'"]),
    ("deep key", spoil_nothing, ["deepspeed.zero_optimization.stag=1"], ["stag", "'stage'"]),
    ("heads", spoil_nothing, ["parallel.tensor=3"], ["parallel.tensor=3", "model.num_attention_heads=8", "use"]),
    ("layers", spoil_nothing, ["parallel.pipeline=5"], ["parallel.pipeline=5", "model.num_hidden_layers=4"]),
    ("batch", spoil_nothing, ["train.micro_batch_size=3"], ["global_batch_size=4", "micro_batch_size=3"]),
    ("vocabulary", spoil_nothing, ["model.vocab_size=1", "parallel.tensor=2"], ["model.vocab_size=1"]),
    ("positions", spoil_nothing, ["data.sequence_length=300"], ["300", "max_position_embeddings=256"]),
    (
        "two precisions",
        spoil_nothing,
        ["deepspeed.bf16={enabled: true}", "train.precision=fp16"],
        ["deepspeed.bf16.enabled=true", "train.precision='fp16'"],
    ),
    ("missing idx", remove_index, [], ["corpus.idx", "no such file"]),
    ("missing bin", remove_tokens, [], ["corpus.bin", "no such file"]),
    ("cut idx", cut_index, [], ["corpus.idx"]),
    ("cut bin", cut_tokens, [], ["corpus.bin", "cut short"]),
    ("token ids", spoil_nothing, ["model.vocab_size=200"], ["token id 299", "200"]),
    ("small corpus", spoil_nothing, ["train.global_batch_size=512"], ["global_batch_size=512", "samples"]),
    (
        "small validation part",
        spoil_nothing,
        ["train.eval_every=5", "data.split=[0.9, 0.1]"],
        ["hold 0 tokens", "data.split"],
    ),
    ("folder", spoil_nothing, ["run.dir=/dev/null/run"], ["run.dir", "/dev/null is not a folder", "another run.dir"]),
    ("less than a sample", spoil_nothing, ["data.split=[0.5, 0.5]"], ["documents", "sequence_length"]),
]


@pytest.mark.parametrize(("spoil", "overrides", "parts"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_line_and_status_2_before_any_rank(
    spoil: Callable[[Path], None],
    overrides: list[str],
    parts: list[str],
    run_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr("megalite.training.local_launch.launch_local")
    prefix = tmp_path / "corpus"
    write_corpus(prefix, np.arange(4000, dtype=np.uint16) % 300)
    spoil(prefix)
    status = main(["train", str(run_file), f"data.train=[{{prefix: {prefix}}}]", *overrides])
    first, error = capsys.readouterr().err.splitlines()
    assert (status, first) == (2, "megalite: checking run.yaml")
    assert error.startswith("megalite: error: ")
    for part in parts:
        assert part in error
    assert not (tmp_path / "run").exists()


def test_a_launcher_must_start_as_many_ranks_as_the_layout_has(run_file: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [*warm.MEGALITE, "train", str(run_file), "parallel.tensor=2", "parallel.data=auto"]
    done = warm.run(command, timeout=60, env=os.environ | place)
    assert done.returncode == 2
    assert done.stderr.startswith("megalite: error: ")
    assert "parallel.tensor=2" in done.stderr
    assert "3" in done.stderr


def test_another_tokenizer_than_the_datas_is_refused(run_file: Path, tmp_path: Path) -> None:
    from megalite.data.tokenizers.load import load_tokenizer
    from megalite.data.tokenizers.train_sentencepiece import train_sentencepiece
    from megalite.errors import UserError

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    model = tmp_path / "tok.model"
    train_sentencepiece([text], vocab_size=300, output=model)
    digest = load_tokenizer(model).digest
    tokens = np.arange(4000, dtype=np.uint16) % 300
    for name, made_with in (("own", digest), ("other", "0" * 64)):
        write_corpus(tmp_path / name, tokens, DatasetSidecar(300, made_with, 4000, 1, 299, 5.0))
    overrides = [f"data.tokenizer={model}", "model.vocab_size=300"]
    check_data(prepare(run_file, [*overrides, f"data.train=[{{prefix: {tmp_path / 'own'}}}]"], None))
    with pytest.raises(UserError, match=r"other\.json: made with a tokenizer of SHA-256 000000000000"):
        check_data(prepare(run_file, [*overrides, f"data.train=[{{prefix: {tmp_path / 'other'}}}]"], None))


def test_a_split_gives_training_and_validation_different_documents(run_file: Path, corpus: Path) -> None:
    overrides = ["data.split=[0.75, 0.25]", "data.sequence_length=16"]
    assert open_datasets(prepare(run_file, overrides, None).config).valid == {}, "nobody asked for an evaluation"
    config = prepare(run_file, [*overrides, "train.eval_every=5"], None).config
    datasets = open_datasets(config)
    total = datasets.train.samples_per_epoch + datasets.valid["valid"].samples_per_epoch
    assert 0.7 < datasets.train.samples_per_epoch / total < 0.8


def test_a_source_that_is_read_too_often_is_warned_of(run_file: Path, corpus: Path) -> None:
    def lines(*overrides: str) -> list[str]:
        return open_datasets(prepare(run_file, overrides, None).config).describe()

    once, *rest = lines("train.steps=10", "data.max_epochs=0.5")
    assert once.startswith(f"data: {corpus} | 40 samples, 100.00% | 0.0")
    assert rest == []
    often, warning = lines("train.steps=2000", "data.max_epochs=2")
    epochs = often.split(" | ")[2].split()[0]
    assert 4 < float(epochs) < 8
    assert warning.startswith(f"warning: {corpus} is read {epochs} times, more than data.max_epochs=2; ")


def test_shares_of_a_blend_are_exact(run_file: Path, corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", np.arange(4000, dtype=np.uint16) % 300)
    sources = f"[{{prefix: {corpus}, weight: 3}}, {{prefix: {tmp_path / 'other'}, weight: 1}}]"
    for order in ("streaming", "megatron"):
        overrides = [f"data.train={sources}", "train.steps=100", f"data.order={order}"]
        uses = open_datasets(prepare(run_file, overrides, None).config).uses
        assert [use.samples for use in uses] == [300, 100]


def test_weights_that_are_auto_follow_the_tokens(run_file: Path, corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", np.arange(4000, dtype=np.uint16) % 300)
    sources = f"[{{prefix: {corpus}, weight: auto}}, {{prefix: {tmp_path / 'other'}, weight: auto}}]"
    datasets = open_datasets(prepare(run_file, [f"data.train={sources}", "train.steps=1000"], None).config)
    assert abs(datasets.uses[0].epochs - datasets.uses[1].epochs) < 0.02


def test_validation_sets_have_names(run_file: Path, corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", np.arange(4000, dtype=np.uint16) % 300)
    valid = f"data.valid=[{{prefix: {corpus}}}, {{prefix: {tmp_path / 'other'}, name: apart}}]"
    datasets = open_datasets(prepare(run_file, [valid, "train.eval_every=5"], None).config)
    assert list(datasets.valid) == ["corpus", "apart"]
    assert datasets.valid["apart"].samples_per_epoch == 3999 // 32


def test_what_is_kept_back_is_neither_trained_nor_evaluated_on(run_file: Path, corpus: Path) -> None:
    overrides = ["data.split=[0.5, 0.25, 0.25]", "train.eval_every=5"]
    datasets = open_datasets(prepare(run_file, overrides, None).config)
    seen = [
        {piece.document for index in range(samples.samples_per_epoch) for piece in samples.pieces(index)}
        for samples in (datasets.train, datasets.valid["valid"])
    ]
    # A sample reads one token beyond its end, but never one of another part.
    assert max(seen[0]) == 199
    assert min(seen[1]) == 200
    assert max(seen[1]) == 299


def test_the_middle_is_not_filled_in_where_targets_are_masked(run_file: Path, tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "chat", np.uint16, with_loss_mask=True)
    writer.add_documents(np.arange(4000, dtype=np.uint16) % 300, [4000], loss_mask=np.ones(4000, np.uint8))
    writer.finalize()
    config = prepare(run_file, [f"data.train=[{{prefix: {tmp_path / 'chat'}}}]"], None).config
    data = config.data.model_copy(update={"fim_rate": 0.5})
    with pytest.raises(UserError, match=r"chat: its loss mask says which tokens count"):
        open_datasets(config.model_copy(update={"data": data}))


@pytest.mark.parametrize("run_file_that_ships", RUN_FILES)
def test_the_run_files_that_ship_pass_a_dry_run(
    run_file_that_ships: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    prefix = tmp_path / "corpus"
    # A hole of zeros: as long as a batch of the largest model, and no disk.
    write_corpus(prefix, np.zeros(100, dtype=np.int32))
    tokens = 8 << 20
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.truncate(4 * tokens)
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[34:38] = tokens.to_bytes(4, "little")
    Path(f"{prefix}.idx").write_bytes(index)
    sidecar = {"vocab_size": 1, "tokenizer_sha256": "", "num_tokens": tokens, "num_documents": 1}
    Path(f"{prefix}.json").write_text(json.dumps(sidecar | {"max_token_id": 0, "token_counts_entropy": 0.0}))
    source = f"[{{prefix: {prefix}}}]"
    data = [f"data.train={source}", f"data.valid={source}", "data.split=null", "data.tokenizer=null"]
    assert main(["train", run_file_that_ships, "--dry-run", *data]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "parameters in the model" in shown
    assert Path(run_file_that_ships).name in shown


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([], ["no pipeline", "ZeRO-1, fp32"]),
        (["parallel.pipeline=2", "parallel.tensor=2"], ["simulated bubble 20.0%", "at most 2 microbatches in flight"]),
        (["parallel.pipeline=2", "parallel.schedule=gpipe"], ["at most 4 microbatches in flight"]),
        (["parallel.data=4"], ["0-3"]),
    ],
)
def test_the_plan_tells_ranks_parameters_and_bubble(run_file: Path, overrides: list[str], parts: list[str]) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(describe(prepare(run_file, overrides, None)))
    for part in parts:
        assert part in capture.get()


def test_parameters_by_rank_add_up_to_the_model(run_file: Path) -> None:
    whole = ParameterCounts(prepare(run_file, [], None)).of_stage(0, 0)
    counts = ParameterCounts(prepare(run_file, ["parallel.pipeline=2", "parallel.tensor=2"], None))
    parts = sum(counts.of_stage(stage, tensor) for stage in range(2) for tensor in range(2))
    norms, table = 9 * 256, 8192 * 256
    assert parts == whole + norms + table  # norms on both tensor ranks, the tied table on both stages


@pytest.mark.parametrize("missing", [True, False])
def test_nvme_without_its_library_ends_before_a_rank_starts(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    offload = f"{{device: nvme, nvme_path: {tmp_path}}}"
    overrides = ["deepspeed.zero_optimization={stage: 3}", f"deepspeed.zero_optimization.offload_optimizer={offload}"]
    plan = prepare(run_file, overrides, None)
    monkeypatch.setattr("megalite.planning.preflight.find_library", lambda name: None if missing else f"lib{name}.so.1")
    if not missing:
        assert check_start(plan) == "start: anew"
        return
    with pytest.raises(UserError, match=r"offload_optimizer.device='nvme' needs libaio.*apt install libaio-dev"):
        check_start(plan)


def test_compiled_layers_without_a_compiler_end_before_a_rank_starts(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(run_file, ["train.compile=true"], None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"train\.compile=true needs a C\+\+ compiler, and 'g\+\+' .* or write"):
        check_start(plan)
    monkeypatch.setenv("CXX", "/bin/sh")
    assert check_start(plan) == "start: anew"


def test_nvme_and_checkpoints_are_refused(run_file: Path, tmp_path: Path) -> None:
    offload = f"{{device: nvme, nvme_path: {tmp_path}}}"
    overrides = ["deepspeed.zero_optimization={stage: 3}", f"deepspeed.zero_optimization.offload_optimizer={offload}"]
    with pytest.raises(UserError, match=r"offload_optimizer.device='nvme' does not go with checkpoint.every=5"):
        prepare(run_file, [*overrides, "checkpoint.every=5"], None)
