"""The rank of a process, read from the environment variables of any launcher."""

import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megalite.errors import UserError

Launcher = Literal["megalite", "torchrun", "deepspeed", "environment", "openmpi", "slurm"]
"""The program that started a rank; ``environment`` is any other launcher that sets RANK and WORLD_SIZE."""

LAUNCHER_PID = "MEGALITE_LAUNCHER_PID"
"""The variable in which `launch_local` gives its process id to its ranks."""
RESTART_COUNT = "MEGALITE_RESTART_COUNT"
"""The variable that counts how often `launch_local` has restarted the ranks."""
STARTED = "MEGALITE_STARTED"
"""The variable in which job scripts and `launch_local` give the time of this start, in seconds since 1970."""
_IMPORTED = time.time()


@dataclass(frozen=True, slots=True)
class LaunchEnvironment:
    """The rank of this process, the number of ranks, and the address of the rendezvous.

    `local_rank` counts the ranks of one machine, of which there are `local_world_size`. Rank 0 listens at the master
    address and port; they are None if the launcher does not set them.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Launcher
    master_address: str | None = None
    master_port: int | None = None
    restarts: int = 0
    """How often the launcher has restarted these ranks."""

    def variables(self) -> dict[str, str]:
        """Return the environment variables from which torch and DeepSpeed read the same rank and address.

        Raises UserError if the master address or port is unknown.
        """
        for name, value in (("MASTER_ADDR", self.master_address), ("MASTER_PORT", self.master_port)):
            if value is None:
                raise UserError(
                    f"environment: {name} is not set, and {self.launcher} does not set it; "
                    f"set {name} to that of rank 0, the same for every rank"
                )
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": str(self.master_address),
            "MASTER_PORT": str(self.master_port),
        }


def start_time(env: Mapping[str, str]) -> float:
    """Return the time at which this start began, in seconds since 1970; by default that of this process."""
    try:
        return float(env[STARTED])
    except (KeyError, ValueError):
        return _IMPORTED


def start_id(env: Mapping[str, str], host: str, pid: int) -> str:
    """Return an identifier that all processes of one start share; process `pid` on `host` calls.

    It names the launching process for `launch_local` and its ranks, and the master address and port for the ranks of
    any other launcher.
    """
    if "RANK" in env and LAUNCHER_PID not in env:
        return f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
    return f"process {env.get(LAUNCHER_PID, pid)} on {host}"


def launch_environment(env: Mapping[str, str]) -> LaunchEnvironment | None:
    """Return the rank that a launcher gave to this process, or None if it was started by hand.

    RANK takes precedence, since torchrun and deepspeed run inside Slurm jobs. Open MPI's variables take precedence over
    Slurm's, since mpirun passes the SLURM_PROCID of the batch script to every rank.

    An interactive shell of Slurm has the variables of a task but is not a rank: see `is_interactive_shell`.

    Raises UserError if a launcher's variables are incomplete or not numbers.
    """
    if "RANK" in env:
        found = _from_rank(env)
    elif "OMPI_COMM_WORLD_RANK" in env:
        found = _from_openmpi(env)
    elif "SLURM_PROCID" in env and not is_interactive_shell(env):
        found = _from_slurm(env)
    else:
        return None
    for name, value, size in (
        ("rank", found.rank, found.world_size),
        ("local rank", found.local_rank, found.local_world_size),
    ):
        if value >= size:
            raise UserError(f"environment: {name} {value} of {found.launcher} is not in 0..{size - 1}")
    return found


_INTERACTIVE_STEP = str(0xFFFFFFFA)
"""The job step in which salloc runs a shell on a node."""


def is_interactive_shell(env: Mapping[str, str]) -> bool:
    """Whether this process was started by hand in an interactive shell of Slurm: ``srun --pty`` of one task, or salloc.

    A command that ``srun --pty`` runs directly looks the same; its ranks are started on this machine as well.
    """
    if any(name in env for name in ("RANK", "OMPI_COMM_WORLD_RANK")) or "SLURM_PROCID" not in env:
        return False
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS"))
    return env.get("SLURM_STEP_ID") == _INTERACTIVE_STEP or ("SLURM_PTY_PORT" in env and tasks == "1")


def _from_rank(env: Mapping[str, str]) -> LaunchEnvironment:
    world_size = _number(env, "WORLD_SIZE", beside="RANK", least=1)
    # torchrun sets the first of these names, deepspeed the second.
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), None)
    return LaunchEnvironment(
        rank=_number(env, "RANK", beside="WORLD_SIZE"),
        world_size=world_size,
        local_rank=_number(env, "LOCAL_RANK", beside="RANK"),
        local_world_size=_number(env, local_size, beside="RANK", least=1) if local_size else world_size,
        launcher=_who_set_rank(env),
        master_address=env.get("MASTER_ADDR"),
        master_port=_port(env),
        restarts=_restarts(env, RESTART_COUNT if LAUNCHER_PID in env else "TORCHELASTIC_RESTART_COUNT"),
    )


def _who_set_rank(env: Mapping[str, str]) -> Launcher:
    if LAUNCHER_PID in env:
        return "megalite"
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in env else "environment"


def _from_openmpi(env: Mapping[str, str]) -> LaunchEnvironment:
    world_size = _number(env, "OMPI_COMM_WORLD_SIZE", beside="OMPI_COMM_WORLD_RANK", least=1)
    local_size = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", beside="OMPI_COMM_WORLD_RANK", least=1)
    return LaunchEnvironment(
        rank=_number(env, "OMPI_COMM_WORLD_RANK", beside="OMPI_COMM_WORLD_SIZE"),
        world_size=world_size,
        local_rank=_number(env, "OMPI_COMM_WORLD_LOCAL_RANK", beside="OMPI_COMM_WORLD_RANK"),
        local_world_size=local_size,
        launcher="openmpi",
        master_address=env.get("MASTER_ADDR", "127.0.0.1" if local_size == world_size else None),
        master_port=_port(env, job=env.get("PMIX_NAMESPACE")),
    )


def _from_slurm(env: Mapping[str, str]) -> LaunchEnvironment:
    if env.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in env:
        raise UserError(
            "environment: SLURM_PROCID is that of the batch script itself, which is not a rank; "
            "start the ranks by `srun`, or by `env -u SLURM_PROCID` in front to launch them all on this machine"
        )
    rank = _number(env, "SLURM_PROCID", beside="SLURM_NTASKS")
    world_size = _number(env, "SLURM_NTASKS", beside="SLURM_PROCID", least=1)
    step, nodes = env.get("SLURM_STEP_ID", "0"), env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST"))
    return LaunchEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=_number(env, "SLURM_LOCALID", beside="SLURM_PROCID"),
        local_world_size=_slurm_tasks_here(env) or world_size,
        launcher="slurm",
        master_address=env.get("MASTER_ADDR", first_host(nodes) if nodes else None),
        master_port=_port(env, job=f"{env['SLURM_JOB_ID']}.{step}" if "SLURM_JOB_ID" in env else None),
        restarts=_restarts(env, "SLURM_RESTART_COUNT"),
    )


def first_host(nodelist: str) -> str:
    """Return the first host of Slurm's compressed list, as ``scontrol show hostnames`` would print it.

    The list is parsed here because containers seldom have scontrol.

    >>> first_host("gpu[003-010,012],login1")
    'gpu003'
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else nodelist)


def _slurm_tasks_here(env: Mapping[str, str]) -> int | None:
    """Return the number of ranks on this node from Slurm's run-length encoding: ``4(x2),3`` is 4, 4, 3."""
    counts = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", ""))
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    by_node = [int(tasks) for tasks, repeat in runs for _ in range(int(repeat or 1))]
    node = _number(env, "SLURM_NODEID", beside="SLURM_PROCID") if "SLURM_NODEID" in env else 0
    return by_node[node] if node < len(by_node) else None


def _port(env: Mapping[str, str], *, job: str | None = None) -> int | None:
    """Return MASTER_PORT, or a port from 20000 to 29999, below the kernel's ephemeral ports, derived from `job`."""
    if "MASTER_PORT" in env:
        return _number(env, "MASTER_PORT", beside="RANK", least=1)
    return 20000 + zlib.crc32(job.encode()) % 10000 if job else None


def _restarts(env: Mapping[str, str], name: str) -> int:
    return _number(env, name, beside="RANK") if name in env else 0


def _number(env: Mapping[str, str], name: str, *, beside: str, least: int = 0) -> int:
    value = env.get(name)
    if value is None:
        raise UserError(
            f"environment: {beside} is set but {name} is not; start the ranks by deepspeed, torchrun, srun or mpirun, "
            f"or by `env -u {beside}` in front to launch them on this machine"
        )
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"environment: {name}={value!r} is not a whole number of at least {least}")
    return int(value)
