"""How ranks come to be, who they are, and how they end together.

- `launch_environment`: which rank this process is, under deepspeed, torchrun, srun or mpirun; None by hand.
- `launch_local`: start the ranks on this machine, and take them all down when one of them dies.
- `keep_log`: a file for what a rank says, under launchers that keep none.
- `run_stand_in`: a fresh process in a rank's place.
- `announce`: tell what a start is doing.
- `die_with_parent`: tie a rank's life to its launcher's, whichever it is.

The standard library alone: a launcher has no use for torch.
"""

from megalite.launch.announce import announce, clear_for_stderr, end_announcement
from megalite.launch.environment import LaunchEnvironment, interactive_shell, launch_environment, start_name, start_time
from megalite.launch.local import USER_ERROR_PREFIX, launch_local
from megalite.launch.parent_watchdog import die_with_parent
from megalite.launch.rank_log import keep_log
from megalite.launch.rank_subprocess import run_stand_in

__all__ = [
    "USER_ERROR_PREFIX",
    "LaunchEnvironment",
    "announce",
    "clear_for_stderr",
    "die_with_parent",
    "end_announcement",
    "interactive_shell",
    "keep_log",
    "launch_environment",
    "launch_local",
    "run_stand_in",
    "start_name",
    "start_time",
]
