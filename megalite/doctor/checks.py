"""Run all checks of one rank, from the rendezvous to process groups; stop after a failure that makes the rest fail."""

import datetime
import time
from collections.abc import Iterator

import torch

from megalite.doctor.bandwidth import axis_rows, matrix_row
from megalite.doctor.connectivity import Listener, failed_connections, listening, own_address, unknown_interfaces
from megalite.doctor.disk import disk_row
from megalite.doctor.hosts import RankInfo, hosts_row, launcher_row
from megalite.doctor.report import Report, Row
from megalite.launch import LaunchEnvironment
from megalite.launch.consistency import process_facts
from megalite.launch.rendezvous import RendezvousResult, all_gather_json, missing_ranks_message, try_rendezvous
from megalite.model.precision import DTYPES
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.mesh import joined_mesh, local_device
from megalite.planning.plan import Plan
from megalite.planning.run_facts import run_facts

TIMEOUT = datetime.timedelta(seconds=30)
_SHOWN = 8


def run_checks(environment: LaunchEnvironment, plan: Plan | None, *, timeout: datetime.timedelta = TIMEOUT) -> Report:
    """Check everything that a run needs of its ranks, and return the report, the same on every rank. Collective.

    Without a plan the ranks form one data axis, and the disk is not checked. Ranks wait for each other at most for
    `timeout` at a time. Raises UserError for mistakes in the user's input before the rendezvous, and RanksMissing if
    rank 0 cannot be reached or a rank ends during the checks.
    """
    started = time.monotonic()
    rows = tuple(_rows(environment, plan, timeout))
    return Report(_title(environment, plan), rows, time.monotonic() - started)


def _rows(environment: LaunchEnvironment, plan: Plan | None, timeout: datetime.timedelta) -> Iterator[Row]:
    size = environment.world_size
    facts = process_facts(size) if plan is None else run_facts(plan, size)
    rendezvous = try_rendezvous(environment, facts, timeout)
    agreement = _agreement_row(rendezvous, environment, plan, timeout)
    yield agreement
    if agreement.verdict == "bad":
        return
    device = local_device(environment.local_rank, environment.launcher)
    mine = RankInfo.here(environment, device).to_json()
    infos = [RankInfo(**info) for info in all_gather_json(rendezvous.store, environment, "hosts", mine)]
    found = [launcher_row(environment, infos), hosts_row(infos), _network_row(rendezvous, environment, device)]
    yield from found
    if any(row.verdict == "bad" for row in found):
        return
    layout = ParallelLayout(data=size) if plan is None else plan.layout
    placement = None if plan is None else plan.placement
    rank, hosts = environment.rank, [info.host for info in infos]
    try:
        with joined_mesh(
            layout, rank, device=device, timeout=timeout, placement=placement, store=rendezvous.store
        ) as mesh:
            yield from axis_rows(mesh)
            yield matrix_row(mesh, _dtype(plan, device), hosts)
            if plan is not None:
                yield disk_row(plan, mesh, hosts)
    except RuntimeError as error:  # torch's errors of process groups, and of a device without memory
        yield Row("process groups", "bad", (f"rank {rank} on {hosts[rank]}: {str(error).splitlines()[0]}",))


def _agreement_row(
    rendezvous: RendezvousResult, environment: LaunchEnvironment, plan: Plan | None, timeout: datetime.timedelta
) -> Row:
    if rendezvous.refusals:  # then rank 0 no longer waited for the missing ranks
        return Row("agreement", "bad", rendezvous.refusals)
    if rendezvous.missing:
        return Row("agreement", "bad", (missing_ranks_message(rendezvous.missing, environment, timeout),))
    if environment.world_size == 1:
        return Row("agreement", "ok", ("one rank: nothing to compare",))
    what = "code and versions" if plan is None else "run file, code, versions, tokenizer, data and checkpoints"
    return Row("agreement", "ok", (f"all {environment.world_size} ranks have the same {what}",))


def _network_row(rendezvous: RendezvousResult, environment: LaunchEnvironment, device: torch.device) -> Row:
    """Test connections from every rank to the others."""
    assert environment.master_address is not None
    with listening(environment.rank, own_address(device, environment.master_address)) as here:
        gathered = all_gather_json(rendezvous.store, environment, "listeners", here.to_json())
        listeners = [Listener(**listener) for listener in gathered]
        mine = [*unknown_interfaces(here), *failed_connections(here, listeners)]
        failures_by_rank: list[list[str]] = all_gather_json(rendezvous.store, environment, "failures", mine)
    failures = [line for lines in failures_by_rank for line in lines]
    if failures:
        more = [f"and {len(failures) - _SHOWN} more pairs"] if len(failures) > _SHOWN else []
        return Row("network", "bad", (*failures[:_SHOWN], *more))
    addresses = {listener.host: listener.address for listener in listeners}
    shown = ", ".join(f"{host} at {address}" for host, address in list(addresses.items())[:_SHOWN])
    reach = "every rank reaches the others" if environment.world_size > 1 else "one rank: no other to reach"
    return Row("network", "ok", (f"{reach}: {shown}{', ...' if len(addresses) > _SHOWN else ''}",))


def _title(environment: LaunchEnvironment, plan: Plan | None) -> str:
    if plan is None:
        return "1 rank" if environment.world_size == 1 else f"{environment.world_size} ranks"
    return f"{plan.config.source.name}: {plan.layout}, {plan.config.precision}"


def _dtype(plan: Plan | None, device: torch.device) -> torch.dtype:
    if plan is not None:
        return DTYPES[plan.config.precision]
    return torch.bfloat16 if device.type == "cuda" else torch.float32
