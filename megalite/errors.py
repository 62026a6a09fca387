"""UserError, the exception for mistakes that the user can fix, and the program's exit statuses.

A message states *where, what was found, what is allowed, the nearest fix*, in one line:
``run.yaml: parallel.tensor=3 does not divide model.num_attention_heads=8; use 1, 2, 4 or 8``.
The command line prints the message once, from one rank, and exits with status 2.
"""

import difflib
from collections.abc import Iterable

USER_ERROR_STATUS = 2
STOPPED_STATUS = 75
"""The exit status of a run, started by hand, that was asked to stop and can be resumed: EX_TEMPFAIL of sysexits.h."""
_SHOWN = 30


class UserError(Exception):
    """A mistake in the user's input; the message names the mistake and the fix."""


class CommonError(UserError):
    """A UserError that every rank raises with the same message; rank 0 alone prints it."""


class RunFailed(RuntimeError):
    """A run failed in the processes of its ranks; the message has the rank that failed first and what it wrote."""


class RanksMissing(RuntimeError):
    """Some ranks did not reach the rendezvous in time. No user input need be wrong: another start may succeed."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest allowed word, or the list of allowed words if no word is close."""
    choices = sorted(allowed)
    if close := did_you_mean(word, choices):
        return close
    if not choices:
        return ""
    more = f" and {len(choices) - _SHOWN:,} more" if len(choices) > _SHOWN else ""
    return f"; allowed: {', '.join(choices[:_SHOWN])}{more}"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest name, and an empty text if no name is close.

    For names of files, where a list of everything else in the folder would not help.
    """
    close = difflib.get_close_matches(word, sorted(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
