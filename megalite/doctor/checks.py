"""One rank's part in an examination, from the ranks' meeting to their groups; it ends where going on has no use."""

import datetime
import time
from collections.abc import Iterator, Sequence

import torch

from megalite.doctor.bandwidth import axis_rows, matrix_row
from megalite.doctor.connectivity import Listener, listening, own_address, unknown_interfaces, unreached
from megalite.doctor.disk import disk_row
from megalite.doctor.hosts import RankPlace, hosts_row, launcher_row
from megalite.doctor.report import Report, Row
from megalite.launch import LaunchEnvironment
from megalite.launch.consistency import process_facts
from megalite.launch.rendezvous import RendezvousResult, all_gather_json, missing_ranks_message, try_rendezvous
from megalite.model.precision import DTYPES
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.mesh import joined_mesh, local_device
from megalite.training.plan import Plan
from megalite.training.run_facts import run_facts

TIMEOUT = datetime.timedelta(seconds=30)
_SHOWN = 8


def examine(environment: LaunchEnvironment, plan: Plan | None, *, timeout: datetime.timedelta = TIMEOUT) -> Report:
    """Look at all that a run needs of its ranks, and return what was found, the same on every rank. Collective.

    Without a plan the ranks are one data axis, and there is no folder to look at. Ranks wait for each other for
    `timeout` at each point where they do. Raises UserError for what the user
    can mend before the ranks have met, and RanksMissing where rank 0 cannot be reached or a rank ends on the way.
    """
    started = time.monotonic()
    rows = tuple(_rows(environment, plan, timeout))
    return Report(_title(environment, plan), rows, time.monotonic() - started)


def _rows(environment: LaunchEnvironment, plan: Plan | None, timeout: datetime.timedelta) -> Iterator[Row]:
    size = environment.world_size
    meeting = try_rendezvous(environment, process_facts(size) if plan is None else run_facts(plan, size), timeout)
    agreement = _agreement_row(meeting, environment, plan, timeout)
    yield agreement
    if agreement.verdict == "bad":
        return
    device = local_device(environment.local_rank, environment.launcher)
    told = all_gather_json(meeting.store, environment, "places", RankPlace.here(environment, device).to_json())
    places = [RankPlace(**one) for one in told]
    found = [launcher_row(environment, places), hosts_row(places), _network_row(meeting, environment, device)]
    yield from found
    if any(row.verdict == "bad" for row in found):
        return
    layout = ParallelLayout(data=size) if plan is None else plan.layout
    placement = None if plan is None else plan.placement
    rank, hosts = environment.rank, [place.host for place in places]
    try:
        with joined_mesh(
            layout, rank, device=device, timeout=timeout, placement=placement, store=meeting.store
        ) as mesh:
            yield from axis_rows(mesh)
            yield matrix_row(mesh, _dtype(plan, device), hosts)
            if plan is not None:
                yield disk_row(plan, mesh, hosts)
    except RuntimeError as error:  # what torch raises of groups, and of a device without memory
        yield Row("process groups", "bad", (f"rank {rank} on {hosts[rank]}: {str(error).splitlines()[0]}",))


def _agreement_row(
    meeting: RendezvousResult, environment: LaunchEnvironment, plan: Plan | None, timeout: datetime.timedelta
) -> Row:
    if meeting.refusals:  # ranks that are missing then are those that rank 0 no longer waited for
        return Row("agreement", "bad", meeting.refusals)
    if meeting.missing:
        return Row("agreement", "bad", (missing_ranks_message(meeting.missing, environment, timeout),))
    if environment.world_size == 1:
        return Row("agreement", "ok", ("one rank: nothing to compare",))
    what = "code and versions" if plan is None else "run file, code, versions, tokenizer, data and checkpoints"
    return Row("agreement", "ok", (f"all {environment.world_size} ranks have the same {what}",))


def _network_row(meeting: RendezvousResult, environment: LaunchEnvironment, device: torch.device) -> Row:
    """Let every rank connect to the others."""
    assert environment.master_address is not None
    with listening(environment.rank, own_address(device, environment.master_address)) as here:
        listeners = [
            Listener(**told) for told in all_gather_json(meeting.store, environment, "listeners", here.to_json())
        ]
        told: Sequence[list[str]] = all_gather_json(
            meeting.store, environment, "failures", [*unknown_interfaces(here), *unreached(here, listeners)]
        )
    failures = [line for lines in told for line in lines]
    if failures:
        more = [f"and {len(failures) - _SHOWN} more pairs"] if len(failures) > _SHOWN else []
        return Row("network", "bad", (*failures[:_SHOWN], *more))
    addresses = {listener.host: listener.address for listener in listeners}
    shown = ", ".join(f"{host} at {address}" for host, address in list(addresses.items())[:_SHOWN])
    reach = "every rank reaches the others" if len(told) > 1 else "one rank: nobody to reach"
    return Row("network", "ok", (f"{reach}: {shown}{', ...' if len(addresses) > _SHOWN else ''}",))


def _title(environment: LaunchEnvironment, plan: Plan | None) -> str:
    if plan is None:
        return "1 rank" if environment.world_size == 1 else f"{environment.world_size} ranks"
    return f"{plan.config.source.name}: {plan.layout}, {plan.config.precision}"


def _dtype(plan: Plan | None, device: torch.device) -> torch.dtype:
    if plan is not None:
        return DTYPES[plan.config.precision]
    return torch.bfloat16 if device.type == "cuda" else torch.float32
