"""Ranks of different runs do not begin: each test brings real ranks together, one of which differs."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_distributed

import megalite
from megalite.data.tokenizers.train_sentencepiece import train_sentencepiece
from megalite.errors import CommonError, RanksMissing, UserError
from megalite.launch import LaunchEnvironment, launch_environment
from megalite.launch.consistency import FIXES, code_digests, first_difference, process_facts
from megalite.launch.rendezvous import rendezvous, run_on_rank_zero, try_rendezvous
from megalite.planning.plan import prepare
from megalite.planning.run_facts import run_facts

SMALL = ("model.hidden_size=32", "model.intermediate_size=64", "parallel.data=auto")
WITHIN = 10.0
"""Seconds from the ranks' start to their end."""
HOST = socket.gethostname()


def here() -> LaunchEnvironment:
    environment = launch_environment(os.environ)
    assert environment is not None
    return environment


def refusal(call: Callable[[], object]) -> str:
    """What a call refuses with; empty where it does not."""
    try:
        call()
    except (CommonError, RanksMissing) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def begin(run: str, overrides: Sequence[Sequence[str]]) -> tuple[str, float]:
    """Be a rank that begins a run with overrides of its own; return what it is refused with, and after how long."""
    started, environment = time.monotonic(), here()
    plan = prepare(Path(run), [*SMALL, *overrides[environment.rank]], environment.world_size)
    facts = run_facts(plan, environment.world_size)
    refused = refusal(lambda: rendezvous(environment, facts, timedelta(seconds=60)))
    return refused, time.monotonic() - started


def begins(run: Path, *overrides: Sequence[str]) -> str:
    """What ranks are refused with, the same on all of them and soon."""
    found = run_distributed(begin, len(overrides), str(run), overrides, init=False)
    assert len({refused for refused, _ in found}) == 1, found
    assert max(seconds for _, seconds in found) < WITHIN
    return found[0][0]


def test_what_agrees_begins(run_file: Path) -> None:
    assert begins(run_file, [], []) == ""


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.optimizer.lr=0.25", "train.optimizer.lr is 0.25, on rank 0 ({host}) 0.0005"),
        ("parallel.tensor=2", "parallel.tensor is 2, on rank 0 ({host}) 1"),
        (
            "deepspeed.zero_optimization.stage=2",
            "deepspeed.zero_optimization.stage is 2, on rank 0 ({host}) 1",
        ),
        ("train.optimizer.betas=[0.8,0.9]", "train.optimizer.betas is [0.8, 0.9], on rank 0 ({host}) [0.9, 0.95]"),
        ("data.train.0.weight=2", "data.train.0.weight is 2.0, on rank 0 ({host}) 1.0"),
    ],
)
def test_another_setting_on_a_rank_is_refused(run_file: Path, override: str, named: str) -> None:
    expected = f"CommonError: rank 1 on {HOST}: {named.format(host=HOST)}; {FIXES['run file']}"
    assert begins(run_file, [], [override]) == expected


def copy_of(prefix: Path, folder: Path) -> Path:
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copyfile(f"{prefix}{suffix}", folder / f"other{suffix}")
    return folder / "other"


def test_places_may_differ_as_long_as_they_hold_the_same(run_file: Path, corpus: Path, tmp_path: Path) -> None:
    copy = copy_of(corpus, tmp_path / "copy")
    elsewhere = [f"data.train.0.prefix={copy}", f"run.dir={tmp_path / 'elsewhere'}", f"data.index_cache={tmp_path}"]
    assert begins(run_file, [], elsewhere) == ""


def test_other_data_on_a_rank_are_refused(run_file: Path, corpus: Path, tmp_path: Path) -> None:
    other = copy_of(corpus, tmp_path / "other")
    tokens = np.memmap(other.with_suffix(".bin"), dtype=np.uint16, mode="r+")
    tokens[-1] += 1
    tokens.flush()
    refused = begins(run_file, [], [f"data.train.0.prefix={other}"])
    assert refused.startswith(f"CommonError: rank 1 on {HOST}: data.train.0 (fingerprint) is ")
    assert refused.endswith(FIXES["data"])


def train_tokenizer(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "corpus.txt").write_text(text)
    train_sentencepiece([folder / "corpus.txt"], vocab_size=300, output=folder / "tok.model")
    return folder / "tok.model"


def test_another_tokenizer_on_a_rank_is_refused(run_file: Path, tmp_path: Path) -> None:
    first = train_tokenizer(tmp_path / "first", "to be or not to be, that is the question\n" * 30)
    other = train_tokenizer(tmp_path / "other", "whether it is nobler in the mind to suffer\n" * 30)
    refused = begins(run_file, [f"data.tokenizer={first}"], [f"data.tokenizer={other}"])
    assert refused.startswith(f"CommonError: rank 1 on {HOST}: data.tokenizer (SHA-256) is ")
    assert refused.endswith(FIXES["tokenizer"])


def test_a_rank_that_sees_other_checkpoints_is_refused(run_file: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    assert begins(run_file, [], [f"run.dir={tmp_path / 'local'}"]) == (
        f"CommonError: rank 1 on {HOST}: the checkpoints in run.dir is none, on rank 0 ({HOST}) step_4; "
        f"{FIXES['checkpoints']}"
    )


def test_every_rank_that_differs_is_named(run_file: Path) -> None:
    refused = begins(run_file, [], ["run.seed=8"], [], ["run.seed=9"])
    assert sorted(line.partition(" on ")[0] for line in refused.splitlines()) == ["CommonError: rank 1", "rank 3"]


# ---- ranks of which not all come, or more than should


def come(world_sizes: Sequence[int], seconds: float) -> tuple[str, float]:
    """Come to the meeting as a rank of a world of some size; 0 is not to come at all."""
    environment, size = here(), world_sizes[here().rank]
    if not size:
        return "", 0.0
    environment, started = replace(environment, world_size=size), time.monotonic()
    facts = process_facts(size)
    refused = refusal(lambda: rendezvous(environment, facts, timedelta(seconds=seconds)))
    return refused, time.monotonic() - started


@pytest.mark.parametrize("sizes", [[2, 4], [4, 2]])
def test_a_rank_of_another_world_is_refused_and_nobody_waits_for_more(sizes: list[int]) -> None:
    found = run_distributed(come, 2, sizes, 60.0, init=False)
    expected = (
        f"CommonError: rank 1 on {HOST}: WORLD_SIZE is {sizes[1]}, on rank 0 ({HOST}) {sizes[0]}; {FIXES['launch']}"
    )
    assert [refused for refused, _ in found] == [expected] * 2
    assert max(seconds for _, seconds in found) < WITHIN


def test_a_rank_that_never_comes_is_named_on_all_others() -> None:
    found = run_distributed(come, 4, [4, 4, 0, 0], 1.0, init=False)
    for refused, seconds in found[:2]:
        assert refused.startswith("RanksMissing: ranks 2-3 of 4 did not come to 127.0.0.1:")
        assert seconds < WITHIN
    assert found[0][1] >= 1.0


def test_where_rank_0_never_comes_the_others_say_where_they_looked() -> None:
    _, (refused, seconds) = run_distributed(come, 2, [0, 2], 1.0, init=False)
    assert refused.startswith("RanksMissing: rank 0 at 127.0.0.1:")
    assert f"does not answer rank 1 on {HOST}" in refused
    assert 1.0 <= seconds < WITHIN


def come_as_rank_1() -> str:
    environment = here()
    if environment.rank:
        environment = replace(environment, rank=1)
    return refusal(lambda: rendezvous(replace(environment, world_size=3), {}, timedelta(seconds=60)))


def test_two_processes_that_are_one_rank_are_refused() -> None:
    found = run_distributed(come_as_rank_1, 3, init=False)
    assert len(set(found)) == 1
    assert found[0].startswith("CommonError: rank 1 came twice: process ")
    assert found[0].endswith("give each run a MASTER_PORT of its own")


def meet_twice() -> tuple[str, float]:
    """Meet in a store that has all of an earlier round, as after a restart by torchrun, and form a group."""
    environment, timeout = here(), timedelta(seconds=60)
    facts = {"run file": {"run.seed": str(environment.rank)}}
    refused = refusal(lambda: rendezvous(environment, facts, timeout))
    store = rendezvous(environment, {}, timeout)
    dist.init_process_group("gloo", store=store, rank=environment.rank, world_size=environment.world_size)
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return refused, float(total)


def test_a_store_that_holds_an_earlier_round_serves_the_next() -> None:
    found = run_distributed(meet_twice, 2, init=False)
    assert [total for _, total in found] == [2.0, 2.0]
    assert "rank 1" in found[0][0]


def test_rank_0_says_that_its_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        environment = LaunchEnvironment(0, 2, 0, 2, "environment", "127.0.0.1", port)
        with pytest.raises(UserError, match=rf"MASTER_PORT={port}: .* {HOST} .*; set another"):
            try_rendezvous(environment, {}, timedelta(seconds=5))


def test_a_master_that_nobody_knows_or_where_nobody_listens_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for rank in (0, 1):
            environment = LaunchEnvironment(rank, 2, rank, 2, "environment", "nohost.invalid", 29500)
            with pytest.raises(UserError, match=r"MASTER_ADDR=nohost.invalid: .*; set "):
                try_rendezvous(environment, {}, timedelta(seconds=1))
        environment = LaunchEnvironment(1, 2, 1, 2, "environment", "127.0.0.1", closed.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(RanksMissing, match=r"rank 0 at 127.0.0.1:\d+ does not answer rank 1 on .* within 1 s"):
            try_rendezvous(environment, {}, timedelta(seconds=1))
        assert time.monotonic() - began < 3


def test_a_port_that_another_program_has_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        environment = LaunchEnvironment(1, 2, 1, 2, "environment", "127.0.0.1", other.getsockname()[1])
        with pytest.raises(RanksMissing, match="rank 1 on .* does not answer; .*: set another MASTER_PORT"):
            try_rendezvous(environment, {}, timedelta(seconds=1))


# ---- what rank 0 finds for all


def ask(answer: str) -> tuple[str, list[int]]:
    """Meet and ask rank 0; what a rank hears or is refused with, and which rank the call ran on."""
    environment, asked = here(), []
    store = rendezvous(environment, {}, timedelta(seconds=60))

    def call() -> str:
        asked.append(environment.rank)
        time.sleep(0.5)
        if answer == "refusal":
            raise UserError(f"rank {environment.rank} refuses")
        if answer == "failure":
            raise OSError(f"rank {environment.rank} fails")
        return f"rank {environment.rank} answers"

    try:
        return run_on_rank_zero(store, environment, "question", call), asked
    except (CommonError, RanksMissing, OSError) as error:
        return f"{type(error).__name__}: {error}", asked


@pytest.mark.parametrize(
    ("answer", "first", "others"),
    [
        ("answer", "rank 0 answers", "rank 0 answers"),
        ("refusal", "CommonError: rank 0 refuses", "CommonError: rank 0 refuses"),
        (
            "failure",
            "OSError: rank 0 fails",
            "RanksMissing: rank 0 failed in the question; ",
        ),
    ],
)
def test_rank_0_answers_for_all(answer: str, first: str, others: str) -> None:
    found = run_distributed(ask, 3, answer, init=False)
    assert found[0] == (first, [0])
    assert [asked for _, asked in found[1:]] == [[], []]
    assert all(answered.startswith(others) for answered, _ in found[1:])


def train_with_a_bad_corpus(run: str, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Begin a run as a launcher's rank; return what it is refused with, and which files it read in whole."""
    from megalite.data.indexed.dataset import IndexedDataset
    from megalite.training.train import train

    read: list[str] = []
    whole = IndexedDataset.max_token_id

    def reading(self: IndexedDataset) -> int:
        read.append(self.tokens_path.name)
        return whole(self)

    IndexedDataset.max_token_id = reading
    plan = prepare(Path(run), overrides, here().world_size)
    return refusal(lambda: train(plan, here())), read


def test_rank_0_alone_reads_the_whole_data_and_all_are_refused(run_file: Path) -> None:
    given = [*SMALL, "model.vocab_size=20", "train.global_batch_size=3"]
    found = run_distributed(train_with_a_bad_corpus, 3, str(run_file), given, init=False)
    assert [read for _, read in found] == [["corpus.bin"], [], []]
    assert len({refused for refused, _ in found}) == 1
    assert "corpus.bin: holds token id" in found[0][0]
    assert found[0][0].startswith("CommonError: ")


# ---- facts


def test_a_difference_names_what_only_one_side_has() -> None:
    theirs = {"code": {"megalite/a.py": "1"}}
    assert first_difference({"code": {}}, theirs, "node0") == (
        f"megalite/a.py is not there, on rank 0 (node0) 1; {FIXES['code']}"
    )
    assert first_difference(theirs, {"code": {}}, "node0") == (
        f"megalite/a.py is 1, on rank 0 (node0) not there; {FIXES['code']}"
    )
    assert first_difference(theirs, theirs, "node0") is None


def test_the_code_is_known_by_every_file() -> None:
    digests = code_digests(Path(megalite.__file__).parent)
    assert {"megalite/training/train.py (SHA-256)", "megalite/data/indexed/writer.py (SHA-256)"} <= digests.keys()


def test_a_run_with_a_sidecar_and_validation_has_facts_of_both(run_file: Path, corpus: Path) -> None:
    plan = prepare(run_file, [f"data.valid=[{{prefix: {corpus}}}]"], 1)
    facts = run_facts(plan, 1)
    assert facts["data"].keys() == {"data.train.0 (fingerprint)", "data.valid.0 (fingerprint)"}
    assert facts["run file"]["model.hidden_size"] == "256"
    assert not [name for name in facts["run file"] if name.endswith(("prefix", "run.dir"))]


# ---- the command, as a launcher starts it


def start_rank(rank: int, port: int, words: Sequence[str], path: str) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    variables = {
        **os.environ,
        **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        **{**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    command = [sys.executable, "-m", "megalite", "train", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=variables, cwd=path, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("differs", ["code", pytest.param("run file", marks=pytest.mark.full)])
def test_the_command_ends_with_status_2_on_every_rank_and_one_message(
    run_file: Path, tmp_path: Path, differs: str
) -> None:
    ours = Path(megalite.__file__).parent
    paths, words = [str(ours.parent)] * 2, [[str(run_file), *SMALL]] * 2
    if differs == "code":
        shutil.copytree(ours, tmp_path / "other" / "megalite", ignore=shutil.ignore_patterns("__pycache__"))
        with (tmp_path / "other" / "megalite/zero/engine.py").open("a") as changed:
            changed.write("# another version\n")
        paths[1] = str(tmp_path / "other")
        named = "megalite/zero/engine.py (SHA-256) is "
    else:
        words[1] = [*words[1], "run.seed=6"]
        named = "run.seed is 6, "
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    ranks = [start_rank(rank, port, words[rank], paths[rank]) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2], said
    of_start, of_all = said[0].splitlines()[:-1], said[0].splitlines()[-1]
    assert all(line.startswith(("megalite: importing ", "megalite: waiting ")) for line in of_start)
    assert of_all.startswith(f"megalite: error: rank 1 on {HOST}: {named}")
    assert of_all.endswith(FIXES[differs])
    assert said[1] == ""
    assert not (tmp_path / "run" / "config.yaml").exists()


# What one rank of a launcher is given, and the others are not.
OTHER_SEED = """
import os, sys
if os.environ.get("RANK") == "1":
    sys.argv.append("run.seed=6")
"""


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["megalite", "torchrun", "deepspeed"])
def test_every_launcher_ends_when_a_rank_differs(run_file: Path, tmp_path: Path, launcher: str) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(OTHER_SEED)
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    words = {
        "megalite": ["-m", "megalite"],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "megalite"],
        "deepspeed": [
            *("-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port),
            *("--module", "megalite"),
        ],
    }[launcher]
    done = subprocess.run(
        [sys.executable, *words, "train", str(run_file), *SMALL, "parallel.tensor=2"],
        env=os.environ
        | {
            **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(Path(megalite.__file__).parents[1])]),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # torchrun says 1 for whatever a rank ended with.
    assert done.returncode == (1 if launcher == "torchrun" else 2), done.stderr
    assert (done.stdout + done.stderr).count(f"megalite: error: rank 1 on {HOST}: run.seed is 6") == 1
