"""Measure the bandwidth along each axis of a layout, and each rank's rate of matrix products.

All groups of an axis communicate at the same time, as in training.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist

from megalite.doctor.report import Row
from megalite.kernels.choice import Kernels, choose_products
from megalite.monitoring.device import matrix_rate, wait_for
from megalite.parallel.json_collectives import gather_json
from megalite.parallel.layout import name_ranks
from megalite.parallel.mesh import Mesh

TOLERATED = 1.3
"""The factor below the median at which a rate is reported as slow."""
_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
_REPEATS = 4
_SHOWN = 8


def axis_rows(mesh: Mesh) -> list[Row]:
    """Measure the bandwidth of each axis with several ranks. Collective."""
    several = [axis for axis in mesh.layout.names if mesh.axes[axis].size > 1]
    return [_pipeline_row(mesh) if axis == "pipeline" else _all_reduce_row(axis, mesh) for axis in several]


def matrix_row(mesh: Mesh, dtype: torch.dtype, hosts: Sequence[str]) -> Row:
    """Measure every rank's rate of matrix products, all at the same time. Collective.

    The row has a warning if ranks compute products of this precision in fp32 because it is faster there.
    """
    dist.barrier()
    products = gather_json(choose_products(mesh.device, dtype), mesh)
    rates = gather_json(matrix_rate(mesh.device, dtype, Kernels(products[mesh.rank]), seconds=0.5), mesh)
    unit, size = ("TFLOP/s", 1e12) if median(rates) >= 1e12 else ("GFLOP/s", 1e9)
    found = {f"rank {rank} on {hosts[rank]}": rate / size for rank, rate in enumerate(rates)}
    name = str(dtype).removeprefix("torch.")
    row = rate_row("matrix products", f"{unit} per rank in {name}", found)
    slow = [f"rank {rank} on {hosts[rank]}" for rank, computed_in in enumerate(products) if computed_in == "fp32"]
    return with_slow_precision(row, name, slow, len(hosts))


def with_slow_precision(row: Row, precision: str, slow: Sequence[str], world_size: int) -> Row:
    """Return the row, with a warning if some ranks, named in `slow`, multiply matrices of this precision in float32,
    since their CPU has no instructions for it."""
    if not slow:
        return row
    more = f" and {len(slow) - _SHOWN} more" if len(slow) > _SHOWN else ""
    who = "every rank" if len(slow) == world_size else ", ".join(slow[:_SHOWN]) + more
    lines = (
        f"{who}: the CPU is slow in {precision}, so that matrix products are computed in float32 and rounded",
        "float32 is as fast there and more precise, for more memory: write train.precision=fp32",
    )
    return replace(row, verdict="warn", lines=(*row.lines, *lines))


def rate_row(check: str, unit: str, rates: Mapping[str, float]) -> Row:
    """Return a row with the median rate, and each rate, by name, that is slower by more than the factor `TOLERATED`."""
    middle, (slowest, least) = median(rates.values()), min(rates.items(), key=lambda item: item[1])
    slow = sorted((rate, name) for name, rate in rates.items() if rate * TOLERATED < middle)
    if not slow:
        spread = f", {_number(least)} at the slowest ({slowest})" if len(rates) > 1 else ""
        return Row(check, "ok", (f"{_number(middle)} {unit}{spread}",))
    lines = [f"{name}: {_number(rate)}, the median is {middle / rate:.1f} times as fast" for rate, name in slow]
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return Row(check, "warn", (f"{_number(middle)} {unit} in the median", *lines[:_SHOWN], *more))


def _all_reduce_row(axis: str, mesh: Mesh) -> Row:
    """Measure all-reduces in bus bandwidth as defined by nccl-tests: 2 (n - 1) / n bytes sent per byte, in GB/s."""
    size, group = mesh.axes[axis].size, mesh.axes[axis].process_group
    message = torch.ones(_BYTES[mesh.device.type] // 4, device=mesh.device)
    dist.all_reduce(message, group=group)
    wait_for(mesh.device)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(_REPEATS):
        dist.all_reduce(message, group=group)
    wait_for(mesh.device)
    seconds = time.perf_counter() - started
    sent = _REPEATS * message.nbytes * 2 * (size - 1) / size
    measured = gather_json([dist.get_process_group_ranks(group), sent / seconds / 1e9], mesh)
    rates = {name_ranks(ranks): min(rate for others, rate in measured if others == ranks) for ranks, _ in measured}
    return rate_row(f"{axis} axis", f"GB/s all-reduced over {size} ranks", rates)


def _pipeline_row(mesh: Mesh) -> Row:
    """Measure the links that carry activations, one pair of pipeline ranks after the other."""
    here, found = mesh.pipeline.rank, []
    message = torch.ones(_BYTES[mesh.device.type] // 4, device=mesh.device)
    for source in range(mesh.pipeline.size):
        for target in range(mesh.pipeline.size):
            if here == source and ("activation", target) in mesh.links.outgoing:
                link = mesh.links.outgoing["activation", target]
                for _ in range(1 + _REPEATS):
                    dist.send(message, link.peer, group=link.group)
                wait_for(mesh.device)
            elif here == target and ("activation", source) in mesh.links.incoming:
                link = mesh.links.incoming["activation", source]
                dist.recv(message, link.peer, group=link.group)
                wait_for(mesh.device)
                started = time.perf_counter()
                for _ in range(_REPEATS):
                    dist.recv(message, link.peer, group=link.group)
                wait_for(mesh.device)
                seconds = time.perf_counter() - started
                found.append([link.peer, mesh.rank, _REPEATS * message.nbytes / seconds / 1e9])
    hops = [hop for of_rank in gather_json(found, mesh) for hop in of_rank]
    rates = {f"rank {source} to {target}": rate for source, target, rate in hops}
    return rate_row("pipeline axis", "GB/s sent to the next stage", rates)


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
