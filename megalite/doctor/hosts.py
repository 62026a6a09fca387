"""Who the ranks are, as each tells of itself, and whether that fits together."""

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
class RankPlace:
    """What a rank tells of itself. `device_id` tells an accelerator from every other, None on a CPU; `memory` is what
    is free on the device or host, in bytes."""

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
    def here(cls, environment: LaunchEnvironment, device: torch.device) -> "RankPlace":
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
        """Return what `RankPlace(**)` takes."""
        return asdict(self)


def launcher_row(environment: LaunchEnvironment, places: Sequence[RankPlace]) -> Row:
    """Say who started the ranks and where they meet, and whether they were counted right."""
    by_host = _by_host(places)
    launchers = sorted({place.launcher for place in places})
    where = f"{environment.master_address}:{environment.master_port}"
    ranks, hosts = _counted(len(places), "rank"), _counted(len(by_host), "host")
    lines = [f"{' and '.join(launchers)}: {ranks} on {hosts}, met at {where}", *_settings(places)]
    warnings = [] if len(launchers) == 1 else ["the ranks were started in different ways; use one launcher"]
    for host, here in by_host.items():
        counts = sorted({place.local_world_size for place in here})
        if counts != [len(here)]:
            told = ", ".join(map(str, counts))
            warnings.append(f"{host} has {_counted(len(here), 'rank')}, and was told of {told}; set LOCAL_WORLD_SIZE")
        if len({place.local_rank for place in here}) < len(here):
            numbers = ", ".join(str(place.local_rank) for place in here)
            warnings.append(f"{host}: LOCAL_RANK is {numbers}; give each rank of a host its own")
    return Row("launcher", "warn" if warnings else "ok", (*lines, *warnings))


def hosts_row(places: Sequence[RankPlace]) -> Row:
    """Say what each host has; hosts that are alike share a line."""
    by_host = _by_host(places)
    alike: dict[str, list[str]] = defaultdict(list)
    for host, here in by_host.items():
        alike[_equipment(here)].append(host)
    lines = [_line(equipment, hosts, by_host) for equipment, hosts in alike.items()]
    wrong = [line for host, here in by_host.items() for line in _shared_accelerators(host, here)]
    warnings = [line for host, here in by_host.items() for line in _too_many_threads(host, here)]
    if len({place.device for place in places}) > 1:
        warnings.append("the devices differ; every step waits for the slowest")
    return Row("hosts", "bad" if wrong else "warn" if warnings else "ok", (*lines, *wrong, *warnings))


def _line(equipment: str, hosts: Sequence[str], by_host: Mapping[str, Sequence[RankPlace]]) -> str:
    places = [place for host in hosts for place in by_host[host]]
    names = ", ".join(hosts[:_SHOWN]) + (", ..." if len(hosts) > _SHOWN else "")
    ranks = name_ranks([place.rank for place in places])
    return f"{names}: {ranks}, {equipment}, {min(place.memory for place in places) / 2**30:.1f} GiB free"


def _shared_accelerators(host: str, here: Sequence[RankPlace]) -> Iterator[str]:
    for device in dict.fromkeys(place.device_id for place in here):
        ranks = [place.rank for place in here if place.device_id == device]
        if device is not None and len(ranks) > 1:
            yield f"{host}: {name_ranks(ranks)} share an accelerator; start one rank for each"


def _too_many_threads(host: str, here: Sequence[RankPlace]) -> Iterator[str]:
    threads, cores = sum(place.threads for place in here), max(place.cores for place in here)
    if here[0].device_id is None and threads > max(cores, len(here)):
        share = max(1, cores // len(here))
        yield f"{host}: {threads} threads on {_counted(cores, 'core')}; set OMP_NUM_THREADS={share}"


def _equipment(here: Sequence[RankPlace]) -> str:
    first = here[0]
    if first.device_id is not None:
        return f"{len({place.device_id for place in here})} x {first.device}"
    return f"CPU, {_counted(max(place.cores for place in here), 'core')}, {_counted(first.threads, 'thread')} a rank"


def _settings(places: Sequence[RankPlace]) -> Iterator[str]:
    """Name what steers NCCL and gloo, and where ranks have other values."""
    for name in sorted({name for place in places for name in place.settings}):
        ranks: Mapping[str, list[int]] = defaultdict(list)
        for place in places:
            ranks[place.settings.get(name, "not set")].append(place.rank)
        if len(ranks) == 1:
            yield f"{name}={next(iter(ranks))}"
        else:
            yield f"{name} differs: " + "; ".join(f"{value} on {format_ranges(here)}" for value, here in ranks.items())


def _by_host(places: Sequence[RankPlace]) -> dict[str, list[RankPlace]]:
    found: dict[str, list[RankPlace]] = defaultdict(list)
    for place in places:
        found[place.host].append(place)
    return found


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _free_memory() -> int:
    """Free memory of this host in bytes; what the page cache holds counts as free, where the system tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
