"""``megalite doctor``: what is wrong is found and named, on real ranks, sockets and disks."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import warm
from harness import run_distributed
from rich.console import Console

import megalite
from megalite.doctor.bandwidth import rate_row, with_slow_precision
from megalite.doctor.checks import run_checks
from megalite.doctor.connectivity import ALL_PAIRS, Listener, failed_connections, listening, peers, unknown_interfaces
from megalite.doctor.hosts import RankInfo, hosts_row, launcher_row
from megalite.doctor.report import Report, Row
from megalite.launch import LaunchEnvironment, launch_environment
from megalite.parallel.layout import format_ranges
from megalite.planning.plan import prepare

HOST = socket.gethostname()
SMALL = ("model.hidden_size=32", "model.intermediate_size=64", "model.vocab_size=256")


def be_examined(run: str | None, overrides: Sequence[Sequence[str]], absent: int | None, seconds: float) -> Report:
    """Be a rank that is examined, with overrides of its own; one does not come."""
    environment = launch_environment(os.environ)
    assert environment is not None
    plan = None
    if run is not None:
        plan = prepare(Path(run), [*SMALL, *overrides[environment.rank]], environment.world_size)
    if environment.rank == absent:
        return Report("", (), 0.0)
    return run_checks(environment, plan, timeout=timedelta(seconds=seconds))


def examined(
    run: Path | None, *overrides: Sequence[str], absent: int | None = None, seconds: float = 60.0, alike: bool = True
) -> Report:
    """What rank 0 finds, and the others too; the same verdict alone where they are not `alike`."""
    path = None if run is None else str(run)
    reports = run_distributed(be_examined, len(overrides), path, overrides, absent, seconds, init=False)
    came = [report for rank, report in enumerate(reports) if rank != absent]
    assert len({report.rows for report in came}) == 1 or not alike
    assert len({report.status for report in came}) == 1
    return reports[0]


def lines_of(report: Report, check: str) -> str:
    (row,) = [row for row in report.rows if row.check == check]
    return "\n".join(row.lines)


def checks(report: Report) -> list[str]:
    return [row.check for row in report.rows]


# ---- on real ranks


def test_every_axis_of_a_layout_is_measured(run_file: Path, tmp_path: Path) -> None:
    axes = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.data=1", "checkpoint.every=5"]
    report = examined(run_file, *[axes] * 4)
    assert report.title == "run.yaml: tensor 2 x pipeline 2 x data 1, fp32"
    assert checks(report) == [
        *("agreement", "launcher", "hosts", "network", "tensor axis", "pipeline axis"),
        *("matrix products", "disk"),
    ]
    assert report.status == 0
    assert lines_of(report, "network").startswith(f"every rank reaches the others: {HOST} at ")
    for axis in ("tensor", "pipeline"):
        rate = re.match(r"([\d.,]+) GB/s ", lines_of(report, f"{axis} axis"))
        assert rate is not None
        assert float(rate[1].replace(",", "")) > 0
    assert "GFLOP/s per rank in float32" in lines_of(report, "matrix products")
    assert "at most 2 exist at a time" in lines_of(report, "disk")
    assert "/s written and flushed by 4 ranks together: a checkpoint in " in lines_of(report, "disk")
    assert not (tmp_path / "run").exists(), "the run's folder is left alone"
    assert list(tmp_path.glob(".doctor-*")) == [], "what was written is removed"


def test_a_precision_that_the_cpu_is_slow_in_is_a_warning() -> None:
    row = Row("matrix products", "ok", ("50 GFLOP/s per rank in bfloat16",))
    assert with_slow_precision(row, "bfloat16", [], 4) == row
    warned = with_slow_precision(row, "bfloat16", [f"rank {rank} on a" for rank in range(4)], 4)
    assert warned.verdict == "warn"
    assert warned.lines[0] == row.lines[0]
    assert warned.lines[1].startswith("every rank: ")
    assert "train.precision=fp32" in warned.lines[2]
    assert with_slow_precision(row, "bfloat16", ["rank 3 on b"], 4).lines[1].startswith("rank 3 on b: ")
    assert "and 2 more" in with_slow_precision(row, "float16", [f"rank {rank} on a" for rank in range(10)], 64).lines[1]


def test_without_a_run_file_the_ranks_are_one_data_axis() -> None:
    report = examined(None, [], [])
    assert (report.title, report.status) == ("2 ranks", 0)
    assert checks(report) == ["agreement", "launcher", "hosts", "network", "data axis", "matrix products"]
    assert lines_of(report, "agreement") == "all 2 ranks have the same code and versions"


def test_ranks_that_differ_are_named_and_nothing_else_is_looked_at(run_file: Path) -> None:
    report = examined(run_file, ["parallel.data=2"], ["parallel.data=2", "run.seed=6"])
    assert (checks(report), report.status) == (["agreement"], 1)
    assert lines_of(report, "agreement").startswith(f"rank 1 on {HOST}: run.seed is 6, on rank 0 ({HOST}) 5; ")


def test_a_rank_that_does_not_come_is_named() -> None:
    report = examined(None, [], [], absent=1, seconds=1.0)
    assert (checks(report), report.status) == (["agreement"], 1)
    assert lines_of(report, "agreement").startswith("rank 1 of 2 did not come to 127.0.0.1:")


def test_a_folder_that_ranks_do_not_share_is_bad(run_file: Path, tmp_path: Path) -> None:
    for name in ("shared", "local"):
        (tmp_path / name / "runs").mkdir(parents=True)
    here, there = (["parallel.data=2", f"run.dir={tmp_path / name / 'runs'}"] for name in ("shared", "local"))
    report = examined(run_file, here, there, alike=False)
    assert report.status == 1
    assert re.fullmatch(
        rf"run.dir=.*/shared/runs: .* rank 0 on {HOST} .* on {HOST}; set run.dir to a folder that all hosts share",
        lines_of(report, "disk"),
    )


def test_a_run_that_the_disk_cannot_hold_is_bad(run_file: Path) -> None:
    huge = ["model.num_hidden_layers=10000", "model.hidden_size=65536", "checkpoint.every=1"]
    report = examined(run_file, huge)
    assert report.status == 1
    assert "checkpoint.keep_last" in lines_of(report, "disk")
    kept = examined(run_file, ["checkpoint.every=1", "checkpoint.keep_last=2"])
    assert kept.status == 0
    assert "at most 3 exist at a time" in lines_of(kept, "disk")


def test_a_place_where_no_folder_can_be_is_bad(run_file: Path) -> None:
    report = examined(run_file, [f"run.dir={run_file / 'run'}"])
    assert report.status == 1
    assert "is not writable: Not a directory; set another run.dir" in lines_of(report, "disk")


# ---- who reaches whom


@contextmanager
def listeners(count: int) -> Iterator[list[Listener]]:
    with ExitStack() as stack:
        yield [stack.enter_context(listening(rank, "127.0.0.1")) for rank in range(count)]


def test_a_rank_that_does_not_listen_is_named() -> None:
    with listeners(3) as here, socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
        closed.close()
        here[2] = replace(here[2], port=port)
        (failure,) = failed_connections(here[1], here)
        found, _, fix = failure.partition("; ")
        assert found == f"rank 1 on {HOST} does not reach rank 2 on {HOST} at 127.0.0.1:{port}: Connection refused"
        assert all(word in fix for word in ("firewall", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"))
        assert failed_connections(here[2], here) == []


def test_another_program_at_the_address_is_not_taken_for_the_rank() -> None:
    with listeners(2) as here, listening(1, "127.0.0.1") as another:
        here[1] = replace(here[1], port=another.port)
        (failure,) = failed_connections(here[0], here)
        assert ": another program answers; " in failure


def test_a_host_whose_name_leads_to_its_loopback_device_is_told_the_fix() -> None:
    with listeners(2) as here, socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
        closed.close()
        here[1] = replace(here[1], host="node1", port=port)
        (failure,) = failed_connections(here[0], here)
        assert "Connection refused; that is the loopback device of node1: " in failure
        assert all(word in failure for word in ("GLOO_SOCKET_IFNAME", "/etc/hosts"))


def test_an_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with listeners(1) as here:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nosuch0")
        (failure,) = unknown_interfaces(here[0])
        assert failure.startswith(f"rank 0 on {here[0].host}: GLOO_SOCKET_IFNAME=nosuch0 ")
        assert " lo" in failure.partition("; ")[2]
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        assert list(unknown_interfaces(here[0])) == []


@pytest.mark.parametrize("world_size", [2, 3, ALL_PAIRS, ALL_PAIRS + 1, 1000])
def test_ranks_are_connected_by_those_they_try(world_size: int) -> None:
    assert all(rank not in peers(rank, world_size) for rank in range(world_size))
    found, waiting = {0}, [0]
    while waiting:
        new = set(peers(waiting.pop(), world_size)) - found
        found |= new
        waiting += new
    assert found == set(range(world_size))
    assert len(peers(0, world_size)) < ALL_PAIRS


# ---- what ranks tell of themselves


def rank_info(rank: int, **more: object) -> RankInfo:
    told = {
        **{"rank": rank, "host": "node0", "launcher": "slurm", "local_rank": rank, "local_world_size": 2},
        **{"device": "CPU", "device_id": None, "memory": 4 << 30, "cores": 2, "threads": 1, "settings": {}},
    }
    return RankInfo(**(told | more))  # pyright: ignore[reportArgumentType]


ENVIRONMENT = LaunchEnvironment(0, 2, 0, 2, "slurm", "node0", 29500)


def test_a_right_start_is_told_in_a_line() -> None:
    row = launcher_row(ENVIRONMENT, [rank_info(0), rank_info(1)])
    assert row == Row("launcher", "ok", ("slurm: 2 ranks on 1 host, met at node0:29500",))


@pytest.mark.parametrize(
    ("second", "found"),
    [
        ({"local_rank": 0}, "node0: LOCAL_RANK is 0, 0; give each rank of a host its own"),
        ({"local_world_size": 1}, "node0 has 2 ranks, but its local world size is 1, 2; set LOCAL_WORLD_SIZE"),
        ({"launcher": "torchrun"}, "the ranks were started in different ways; use one launcher"),
    ],
)
def test_a_launcher_that_counts_wrong_is_warned_of(second: dict[str, object], found: str) -> None:
    row = launcher_row(ENVIRONMENT, [rank_info(0), rank_info(1, **second)])
    assert (row.verdict, row.lines[-1]) == ("warn", found)


def test_settings_of_the_network_are_told_and_where_they_differ() -> None:
    same, other = {"NCCL_DEBUG": "WARN"}, {"NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "eth0"}
    row = launcher_row(ENVIRONMENT, [rank_info(0, settings=same), rank_info(1, settings=other)])
    assert row.lines[1:] == ("GLOO_SOCKET_IFNAME differs: not set on 0; eth0 on 1", "NCCL_DEBUG=WARN")


def test_hosts_that_are_alike_share_a_line() -> None:
    gpu = {"device": "H100", "memory": 79 << 30, "cores": 16, "local_world_size": 2}
    infos = [
        rank_info(rank, host=f"node{rank // 2}", local_rank=rank % 2, device_id=f"GPU-{rank}", **gpu)
        for rank in range(4)
    ]
    assert hosts_row(infos) == Row("hosts", "ok", ("node0, node1: ranks 0-3, 2 x H100, 79.0 GiB free",))
    shared = hosts_row([*infos[:3], replace(infos[3], device_id="GPU-2")])
    assert (shared.verdict, shared.lines[-1]) == (
        "bad",
        "node1: ranks 2-3 share an accelerator; start one rank for each",
    )
    mixed = hosts_row([*infos[:3], replace(infos[3], device="A100")])
    assert (mixed.verdict, mixed.lines[-1]) == ("warn", "the devices differ; every step waits for the slowest")


def test_more_threads_than_cores_are_warned_of() -> None:
    row = hosts_row([rank_info(0, threads=2), rank_info(1, threads=2)])
    assert (row.verdict, row.lines[-1]) == ("warn", "node0: 4 threads on 2 cores; set OMP_NUM_THREADS=1")
    assert hosts_row([rank_info(rank) for rank in range(4)]).verdict == "ok", "there is no smaller number of threads"


# ---- rates, and the table


def test_what_is_beyond_the_median_is_named() -> None:
    rates = {"rank 0": 100.0, "rank 1": 101.0, "rank 2": 50.0, "rank 3": 99.0}
    assert rate_row("matrix products", "TFLOP/s", rates) == Row(
        "matrix products",
        "warn",
        ("99.5 TFLOP/s in the median", "rank 2: 50, the median is 2.0 times as fast"),
    )
    assert rate_row("matrix products", "TFLOP/s", rates | {"rank 2": 77.0}).verdict == "ok"
    assert rate_row("x", "GB/s", {"one": 1234.0}).lines == ("1,234 GB/s",)


def test_numbers_are_written_as_stretches() -> None:
    assert (format_ranges([3]), format_ranges([0, 1, 2, 5, 7, 8]), format_ranges([])) == ("3", "0-2, 5, 7-8", "")
    assert format_ranges(range(0, 4096, 8)) == "0, 8, ..., 4088"


def test_a_report_is_kept_and_shown(tmp_path: Path) -> None:
    rows = (Row("network", "ok", ("fine [eth0]",)), Row("disk", "warn", ("a " * 60, "second")))
    report = Report("run.yaml", rows, 1.25)
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report
    assert (report.status, report.conclusion) == (0, "nothing is bad; warnings: disk (1.2 s)")
    bad = Report("run.yaml", (*rows, Row("hosts", "bad", ("none",))), 1.0)
    assert (bad.status, bad.conclusion) == (1, "bad: hosts (1.0 s)")
    assert Report("", rows[:1], 0.0).conclusion == "fine (0.0 s)"
    for width in (80, 120):
        console = Console(width=width)
        with console.capture() as shown:
            console.print(report.table())
        assert max(map(len, shown.get().splitlines())) <= width
        assert "fine [eth0]" in shown.get()


# ---- the command


def doctor(launcher: Sequence[str], *words: str, scratch: Path) -> subprocess.CompletedProcess[str]:
    scratch.mkdir()
    environment = os.environ | {
        **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)},
        **{"PYTHONPATH": str(Path(megalite.__file__).parents[1]), "COLUMNS": "120"},
    }
    command = [sys.executable, *launcher, "doctor", *words]
    return warm.run(command, timeout=200, env=environment)


def test_by_hand_it_launches_the_ranks_of_the_layout(run_file: Path, tmp_path: Path) -> None:
    done = doctor(["-m", "megalite"], str(run_file), *SMALL, "parallel.tensor=2", scratch=tmp_path / "scratch")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "run.yaml: tensor 2 x pipeline 1 x data 1, fp32"
    assert lines[2].split()[:5] == ["launcher", "ok", "megalite:", "2", "ranks"]
    assert re.match(r"(fine|nothing is bad; warnings: .*) \(\d+\.\d s\)$", lines[-1])
    assert list((tmp_path / "scratch").iterdir()) == [], "nothing is left behind"


def test_what_is_bad_ends_with_status_1(run_file: Path, tmp_path: Path) -> None:
    done = doctor(["-m", "megalite"], str(run_file), f"run.dir={run_file / 'run'}", scratch=tmp_path / "scratch")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("bad: disk (")


def test_a_mistake_in_the_run_file_ends_with_status_2(run_file: Path, tmp_path: Path) -> None:
    done = doctor(["-m", "megalite"], str(run_file), "parallel.tensor=3", scratch=tmp_path / "scratch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("megalite: error: command line: parallel.tensor=3 does not divide")


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("bad", [False, True])
def test_under_a_launcher_it_looks_at_the_launchers_ranks(
    run_file: Path, tmp_path: Path, launcher: str, bad: bool
) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    words = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "megalite"],
        "deepspeed": [
            *("-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port),
            *("--module", "megalite"),
        ],
    }[launcher]
    run = [str(run_file), *SMALL, "parallel.tensor=2", f"run.dir={run_file / 'run'}"] if bad else []
    done = doctor(words, *run, scratch=tmp_path / "scratch")
    assert done.returncode == int(bad), done.stdout + done.stderr
    assert re.search(rf"launcher +ok +{launcher}: 2 ranks on 1 host, met at ", done.stdout)
    assert ("bad: disk (" in done.stdout) == bad
