"""Saving and loading a training state of about 1 GB beside other ways to do it: writes results/checkpoint.md.

    python benchmarks/checkpoint.py [--rounds 5] [--folder DIR]

ZeRO-1 on one rank, and on two that are data parallel: master weights and both moments. All ways save the same tensors
in turn, and what is timed ends when every byte is on the disk (fsync). Loading is from the disk, the page cache
dropped, and digests are checked where there are any.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from machine import describe
from profile_step import free_port
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.multiprocessing.spawn import spawn
from workload import LAYOUTS, Job

from megalite.zero.engine import ZeroEngine

RESULT = Path(__file__).parent / "results" / "checkpoint.md"
JOB = Job(
    hidden_size=768,
    num_hidden_layers=9,
    num_attention_heads=12,
    intermediate_size=2048,
    vocab_size=16384,
    sequence_length=128,
    global_batch_size=2,
    micro_batch_size=1,
)


class Rank:
    """One rank: megalite's trainer, the tensors of its state, and every way to save and to load them."""

    def __init__(self, rank: int, port: int, folder: Path, layout: str) -> None:
        # After the environment is set, which torch and DeepSpeed read when they are imported.
        from contender_megalite import Megalite

        from megalite.checkpoint.fragments import parts

        self.rank, self.folder = rank, folder
        self.megalite = Megalite(JOB, layout)
        self.megalite.setup(rank, LAYOUTS[layout].world_size, port)
        self.megalite.step()
        self.trainer = self.megalite.trainer
        self.state = self.trainer.engine.state
        self.tensors = {
            f"{number}.{kind}": flat.detach()
            for number, fragment in enumerate(self.state.fragments())
            for kind, flat in fragment.tensors.items()
        }
        self.bytes = torch.tensor(sum(4 * part.region.numel for part in parts(self.state.fragments())))
        dist.all_reduce(self.bytes)

    def timed(self, action: Callable[[], object]) -> float:
        """Return the seconds until all ranks are through."""
        dist.barrier()
        began = time.perf_counter()
        action()
        dist.barrier()
        return time.perf_counter() - began

    def clear(self) -> None:
        """Leave nothing of the last save on the disk; and what the system still has to write, written."""
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            os.sync()
        dist.barrier()

    def forget(self) -> None:
        """Drop what the system keeps of the saved files in memory."""
        dist.barrier()
        for path in sorted(self.folder.rglob("*"))[self.rank :: dist.get_world_size()]:
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    # ---------------------------------------------------------------------------------------------------- megalite

    def checkpointer(self, *, asynchronous: bool):
        """Return megalite's own, over this folder."""
        from megalite.config.sections import CheckpointSection
        from megalite.training.checkpointing import Checkpointer

        settings = CheckpointSection.model_validate({"every": 1, "async": asynchronous})
        mesh = self.trainer.mesh
        return Checkpointer(
            settings, self.folder, self.state, mesh, tensor_bytes=self.trainer.plan.checkpoint_bytes, files={}
        )

    def save_megalite(self, checkpointer) -> None:
        checkpointer.save(self.trainer.plan.manifest(1), self.trainer._progress(1))
        checkpointer.wait()

    def async_blocked(self, checkpointer, *, train: bool) -> tuple[float, float]:
        """Return the seconds that an asynchronous save blocked and took: under training, or an update at once."""
        dist.barrier()
        checkpointer.save(self.trainer.plan.manifest(1), self.trainer._progress(1))
        if train:
            self.trainer.checkpointer = checkpointer
            self.megalite.step()
        else:
            checkpointer.before_update()
        under_way = checkpointer._under_way.report
        blocked = torch.tensor(under_way.blocked_seconds)
        checkpointer.wait()
        dist.all_reduce(blocked, op=dist.ReduceOp.MAX)
        durable = torch.tensor(under_way.durable_seconds)
        dist.broadcast(durable, 0)
        return float(blocked), float(durable)

    def load_megalite(self) -> None:
        from megalite.checkpoint.reader import CheckpointReader

        reader = CheckpointReader(self.folder / "step_1")
        mine = sorted(reader.manifest.files)[self.rank :: dist.get_world_size()]
        assert reader.problems(mine) == []
        self.state.restore(reader, reader.state["optimizer"])

    # ------------------------------------------------------------------------------------------------------ others

    @property
    def own_file(self) -> Path:
        return self.folder / f"{self.rank}.bin"

    def save_safetensors(self) -> None:
        from safetensors.torch import save_file

        save_file(self.tensors, self.own_file)
        sync(self.own_file)

    def load_safetensors(self) -> None:
        from safetensors.torch import load_file

        self.copy(load_file(self.own_file))

    def save_torch(self) -> None:
        with self.own_file.open("wb") as file:
            torch.save({name: tensor.clone() for name, tensor in self.tensors.items()}, file)
        sync(self.own_file)

    def load_torch(self) -> None:
        self.copy(torch.load(self.own_file, weights_only=True))

    def save_dcp(self) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        save({f"{self.rank}.{name}": tensor for name, tensor in self.tensors.items()}, checkpoint_id=self.folder)

    def load_dcp(self) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load

        load({f"{self.rank}.{name}": tensor for name, tensor in self.tensors.items()}, checkpoint_id=self.folder)

    @property
    def _deepspeed(self) -> DeepSpeedEngine:
        assert isinstance(self.trainer.engine, ZeroEngine)
        return self.trainer.engine.engine

    def save_deepspeed(self) -> None:
        self._deepspeed.save_checkpoint(str(self.folder), tag="step")
        for path in sorted(self.folder.rglob("*.pt"))[self.rank :: dist.get_world_size()]:
            sync(path)

    def load_deepspeed(self) -> None:
        self._deepspeed.load_checkpoint(str(self.folder), tag="step")

    def copy(self, loaded: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(loaded[name])


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


WAYS = ("safetensors", "torch", "dcp", "deepspeed")
TITLES = {
    "megalite": "megalite, SHA-256 of every file",
    "safetensors": "bare safetensors, a file a rank",
    "torch": "torch.save of the same tensors",
    "dcp": "torch.distributed.checkpoint",
    "deepspeed": "DeepSpeed's save_checkpoint (bf16 weights too)",
}


def measure(rank: Rank, rounds: int) -> Iterator[tuple[str, float]]:
    """Save and load in turn, every way each round; yield (what, seconds)."""
    plain, background = rank.checkpointer(asynchronous=False), rank.checkpointer(asynchronous=True)
    for number in track(range(rounds + 1), disable=rank.rank > 0, description="rounds"):
        seconds: dict[str, float] = {}
        rank.clear()
        seconds["megalite save"] = rank.timed(lambda: rank.save_megalite(plain))
        rank.forget()
        seconds["megalite load"] = rank.timed(rank.load_megalite)
        for way in WAYS:
            rank.clear()
            seconds[f"{way} save"] = rank.timed(getattr(rank, f"save_{way}"))
            rank.forget()
            seconds[f"{way} load"] = rank.timed(getattr(rank, f"load_{way}"))
        for what, train in (("training", True), ("update", False)):
            rank.clear()
            blocked, durable = rank.async_blocked(background, train=train)
            seconds |= {f"async {what} blocked": blocked, f"async {what} durable": durable}
        if number:  # the first warms everything up
            yield from seconds.items()
    rank.clear()
    rank.save_megalite(plain)


def run_rank(number: int, port: int, folder: str, rounds: int, layout: str, results: SimpleQueue) -> None:
    """Measure on one rank; rank 0 puts the seconds into `results`."""
    os.environ |= {
        "RANK": str(number),
        "WORLD_SIZE": str(LAYOUTS[layout].world_size),
        "LOCAL_RANK": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    rank = Rank(number, port, Path(folder), layout)
    if layout != "tp2":
        measured = list(measure(rank, rounds))
    else:
        measured = []
        for _ in range(rounds):
            rank.forget()
            measured.append(("megalite reshard", rank.timed(rank.load_megalite)))
    if number == 0:
        results.put((int(rank.bytes), measured))
    dist.barrier()
    os._exit(0)


def main() -> None:
    """Run both teams and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder unless given")
    arguments = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = {"one": defaultdict(list), "dp2": defaultdict(list)}
    size = 0
    for layout, found in seconds.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            for loaded_at in (layout, "tp2") if layout == "dp2" else (layout,):
                results = get_context("spawn").SimpleQueue()
                given = (free_port(), folder, arguments.rounds, loaded_at, results)
                team = spawn(run_rank, given, nprocs=LAYOUTS[layout].world_size, join=False)
                assert team is not None
                size, measured = results.get()
                team.join()
                for what, value in measured:
                    found[what].append(value)
    medians = {layout: {what: median(v) for what, v in found.items()} for layout, found in seconds.items()}
    report(size, medians, arguments.rounds)


HEADINGS = {"one": "One rank: a core for the digest", "dp2": "Two ranks: both cores busy with both"}


def report(size: int, medians: dict[str, dict[str, float]], rounds: int) -> None:
    """Print the tables and write them."""
    lines = [
        "# Saving and loading a checkpoint",
        "",
        f"`python benchmarks/checkpoint.py --rounds {rounds}`",
        "",
        describe().markdown()
        + f"- {size / 1e6:,.0f} MB: fp32 weights and both moments of {size // 12 / 1e6:,.1f} M parameters, ZeRO-1",
        "",
        f"Medians of {rounds} rounds after one to warm up, every way once a round, one after the other on an otherwise",
        "idle disk. A save ends when it is on the disk, megalite's with its digests, manifest and rename; a load is",
        "from the disk into the optimizer's tensors, and megalite's with every digest checked. *Ratio* is the speed",
        "beside bare safetensors, which checks and describes nothing.",
        "",
    ]
    for layout, seconds in medians.items():
        tables = speeds(size, seconds), asynchronous(seconds)
        lines += [f"## {HEADINGS[layout]}", ""]
        for table in tables:
            show(table, HEADINGS[layout])
            lines += [*markdown(table), ""]
    RESULT.write_text("\n".join(lines), encoding="utf-8")


def speeds(size: int, seconds: dict[str, float]) -> list[list[str]]:
    """Return the rows for saving and loading."""
    rows = [["way", "save, s", "MB/s to the disk", "save, ratio", "load, s", "MB/s loaded", "load, ratio"]]
    for way in ("megalite", *WAYS):
        cells = []
        for what in ("save", "load"):
            took, bare = seconds[f"{way} {what}"], seconds[f"safetensors {what}"]
            cells += [f"{took:.2f}", f"{size / took / 1e6:,.0f}", f"{bare / took:.2f}"]
        rows.append([TITLES[way], *cells])
    if reshard := seconds.get("megalite reshard"):
        rate = f"{size / reshard / 1e6:,.0f}"
        rows.append(["megalite, saved at data 2, loaded at tensor 2", "", "", "", f"{reshard:.2f}", rate, ""])
    return rows


def asynchronous(seconds: dict[str, float]) -> list[list[str]]:
    """Return the rows for saves in the background."""
    rows = [["asynchronous save", "blocked, s", "durable after, s", "blocked / durable"]]
    for what, title in (("training", "while a step trains"), ("update", "an update at once: the copy alone")):
        stop, whole = seconds[f"async {what} blocked"], seconds[f"async {what} durable"]
        rows.append([title, f"{stop:.3f}", f"{whole:.2f}", f"{stop / whole:.3f}"])
    return rows


def show(rows: list[list[str]], title: str) -> None:
    """Print rows, the first of them the head."""
    table = Table(title=title)
    for number, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=150).print(table)


def markdown(rows: list[list[str]]) -> list[str]:
    """Return rows as the lines of a table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


if __name__ == "__main__":
    main()
