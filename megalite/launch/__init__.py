"""Start the ranks of a run, identify the rank of a process, compare the ranks' settings, and end all ranks together.

- `launch_environment`: the rank of this process, under deepspeed, torchrun, srun or mpirun; None if started by hand.
- `launch_local`: start the ranks on this machine, and end all of them when one dies.
- `tee_to_log`: copy a rank's output to a log file, for launchers that keep none.
- `run_rank_subprocess`: run a command as this rank in a child process.
- `announce`: show the current step of the start-up.
- `die_with_parent`: end a rank when its launcher ends, under any launcher.

These modules import the standard library alone, since a launcher does not need torch; `rendezvous` needs it.
"""

from megalite.launch.announce import announce, clear_announcement, clear_announcement_before_stderr
from megalite.launch.environment import (
    LaunchEnvironment,
    is_interactive_shell,
    launch_environment,
    start_id,
    start_time,
)
from megalite.launch.local import USER_ERROR_PREFIX, launch_local, reserved_port
from megalite.launch.parent_watchdog import die_with_parent
from megalite.launch.rank_log import tee_to_log
from megalite.launch.rank_subprocess import run_rank_subprocess

__all__ = [
    "USER_ERROR_PREFIX",
    "LaunchEnvironment",
    "announce",
    "clear_announcement_before_stderr",
    "die_with_parent",
    "clear_announcement",
    "is_interactive_shell",
    "tee_to_log",
    "launch_environment",
    "launch_local",
    "reserved_port",
    "run_rank_subprocess",
    "start_id",
    "start_time",
]
