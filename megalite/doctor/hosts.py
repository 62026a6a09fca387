"""Collect each rank's host, device, memory and settings, and check that they are consistent."""

import os
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megalite.doctor.report import Row
from megalite.launch import LaunchEnvironment
from megalite.parallel.layout import format_ranges, name_ranks

_SHOWN = 8
_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_")


@dataclass(frozen=True, slots=True)
class RankInfo:
    """A rank's host, launcher, device and settings.

    `device_id` identifies an accelerator uniquely; it is None on a CPU. `memory` is the free memory of the device or
    host, in bytes.
    """

    rank: int
    host: str
    launcher: str
    local_rank: int
    local_world_size: int
    device: str
    device_id: str | None
    memory: int
    cores: int
    threads: int
    settings: dict[str, str]

    @classmethod
    def here(cls, environment: LaunchEnvironment, device: torch.device) -> "RankInfo":
        """Describe this rank."""
        name, device_id, memory = "CPU", None, _free_memory()
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            name, device_id = properties.name, str(properties.uuid)
            memory = torch.cuda.mem_get_info(device)[0]
        return cls(
            rank=environment.rank,
            host=socket.gethostname(),
            launcher=environment.launcher,
            local_rank=environment.local_rank,
            local_world_size=environment.local_world_size,
            device=name,
            device_id=device_id,
            memory=memory,
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            settings={name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the keyword arguments of `RankInfo`."""
        return asdict(self)


def launcher_row(environment: LaunchEnvironment, infos: Sequence[RankInfo]) -> Row:
    """Return a row with launcher, number of ranks and rendezvous; warn about wrong local ranks and sizes."""
    by_host = _by_host(infos)
    launchers = sorted({info.launcher for info in infos})
    where = f"{environment.master_address}:{environment.master_port}"
    ranks, hosts = _counted(len(infos), "rank"), _counted(len(by_host), "host")
    lines = [f"{' and '.join(launchers)}: {ranks} on {hosts}, met at {where}", *_settings(infos)]
    warnings = [] if len(launchers) == 1 else ["the ranks were started in different ways; use one launcher"]
    for host, here in by_host.items():
        counts = sorted({info.local_world_size for info in here})
        if counts != [len(here)]:
            given = ", ".join(map(str, counts))
            ranks_here = _counted(len(here), "rank")
            warnings.append(f"{host} has {ranks_here}, but its local world size is {given}; set LOCAL_WORLD_SIZE")
        if len({info.local_rank for info in here}) < len(here):
            numbers = ", ".join(str(info.local_rank) for info in here)
            warnings.append(f"{host}: LOCAL_RANK is {numbers}; give each rank of a host its own")
    return Row("launcher", "warn" if warnings else "ok", (*lines, *warnings))


def hosts_row(infos: Sequence[RankInfo]) -> Row:
    """Return a row with the hardware of each host; identical hosts share a line."""
    by_host = _by_host(infos)
    alike: dict[str, list[str]] = defaultdict(list)
    for host, here in by_host.items():
        alike[_hardware(here)].append(host)
    lines = [_line(hardware, hosts, by_host) for hardware, hosts in alike.items()]
    wrong = [line for host, here in by_host.items() for line in _shared_accelerators(host, here)]
    warnings = [line for host, here in by_host.items() for line in _too_many_threads(host, here)]
    if len({info.device for info in infos}) > 1:
        warnings.append("the devices differ; every step waits for the slowest")
    return Row("hosts", "bad" if wrong else "warn" if warnings else "ok", (*lines, *wrong, *warnings))


def _line(hardware: str, hosts: Sequence[str], by_host: Mapping[str, Sequence[RankInfo]]) -> str:
    infos = [info for host in hosts for info in by_host[host]]
    names = ", ".join(hosts[:_SHOWN]) + (", ..." if len(hosts) > _SHOWN else "")
    ranks = name_ranks([info.rank for info in infos])
    return f"{names}: {ranks}, {hardware}, {min(info.memory for info in infos) / 2**30:.1f} GiB free"


def _shared_accelerators(host: str, here: Sequence[RankInfo]) -> Iterator[str]:
    for device in dict.fromkeys(info.device_id for info in here):
        ranks = [info.rank for info in here if info.device_id == device]
        if device is not None and len(ranks) > 1:
            yield f"{host}: {name_ranks(ranks)} share an accelerator; start one rank for each"


def _too_many_threads(host: str, here: Sequence[RankInfo]) -> Iterator[str]:
    threads, cores = sum(info.threads for info in here), max(info.cores for info in here)
    if here[0].device_id is None and threads > max(cores, len(here)):
        share = max(1, cores // len(here))
        yield f"{host}: {threads} threads on {_counted(cores, 'core')}; set OMP_NUM_THREADS={share}"


def _hardware(here: Sequence[RankInfo]) -> str:
    first = here[0]
    if first.device_id is not None:
        return f"{len({info.device_id for info in here})} x {first.device}"
    cores = _counted(max(info.cores for info in here), "core")
    return f"CPU, {cores}, {_counted(first.threads, 'thread')} per rank"


def _settings(infos: Sequence[RankInfo]) -> Iterator[str]:
    """Yield the variables that configure NCCL and gloo, and the ranks whose values differ."""
    for name in sorted({name for info in infos for name in info.settings}):
        ranks: Mapping[str, list[int]] = defaultdict(list)
        for info in infos:
            ranks[info.settings.get(name, "not set")].append(info.rank)
        if len(ranks) == 1:
            yield f"{name}={next(iter(ranks))}"
        else:
            yield f"{name} differs: " + "; ".join(f"{value} on {format_ranges(here)}" for value, here in ranks.items())


def _by_host(infos: Sequence[RankInfo]) -> dict[str, list[RankInfo]]:
    found: dict[str, list[RankInfo]] = defaultdict(list)
    for info in infos:
        found[info.host].append(info)
    return found


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _free_memory() -> int:
    """Return the free memory of this host in bytes; on Linux the page cache counts as free."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
