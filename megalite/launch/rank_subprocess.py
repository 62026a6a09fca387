"""Run a megalite command as this rank in a child process, for work that a process can do only once.

DeepSpeed keeps global state, so that a process can build a single engine.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from megalite.launch.environment import LAUNCHER_PID, LaunchEnvironment


def run_rank_subprocess(argv: Sequence[str], environment: LaunchEnvironment, *, world_size: int, number: int) -> int:
    """Run ``megalite`` with `argv` as this rank of the first `world_size` ranks, and return its exit status.

    `number`, counted from 1, must differ between calls: the ranks of a call use the port `number` above the launcher's,
    since a port is not free again at once. The child ends with this process, as a rank ends with its launcher; call it
    from the main thread. The status is -N after signal N, as in subprocess.

    Raises UserError if the master address or port is unknown.
    """
    environment.variables()
    assert environment.master_port is not None
    child = replace(environment, world_size=world_size, master_port=environment.master_port + number)
    variables = {
        **os.environ,
        **child.variables(),
        LAUNCHER_PID: str(os.getpid()),
        # The store of torchrun's agent is at the launcher's port: at this port rank 0 opens a store.
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    return subprocess.run([sys.executable, "-m", "megalite", *argv], env=variables, check=False).returncode
