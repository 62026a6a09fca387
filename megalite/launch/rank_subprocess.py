"""A fresh process in a rank's place: for work that a process can do once, as DeepSpeed keeps state of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from megalite.launch.environment import LAUNCHER_PID, LaunchEnvironment


def run_stand_in(argv: Sequence[str], environment: LaunchEnvironment, *, world_size: int, number: int) -> int:
    """Run ``megalite`` with `argv` as this rank of the first `world_size`, and return its exit status.

    The ranks of call number `number`, from 1, meet at a port of their own, so many above the launcher's: each call
    is to have another, since a port is not free again at once. The process ends with this one, as a rank ends with
    its launcher; call it from the main thread. Minus N is signal N, as in subprocess.

    Raises UserError where nothing says at which address and port the ranks meet.
    """
    environment.variables()
    assert environment.master_port is not None
    place = replace(environment, world_size=world_size, master_port=environment.master_port + number)
    variables = {
        **os.environ,
        **place.variables(),
        LAUNCHER_PID: str(os.getpid()),
        # torchrun's ranks meet in a store of its agent; nobody has opened one at the port of these.
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    return subprocess.run([sys.executable, "-m", "megalite", *argv], env=variables, check=False).returncode
