"""The one kind of error that is the user's to mend.

A message says *where, what was found, what is allowed, the nearest fix*, in one line:
``run.yaml: parallel.tensor=3 does not divide model.num_attention_heads=8; use 1, 2, 4 or 8``.
The command line prints it once, from one rank, and ends with status 2.
"""

import difflib
from collections.abc import Iterable

USER_ERROR_STATUS = 2
STOPPED_STATUS = 75
"""The exit status of a run, started by hand, that was asked to stop and can go on: sysexits' EX_TEMPFAIL."""
_SHOWN = 30


class UserError(Exception):
    """Something that the user asked for and cannot have; the message says what to write instead."""


class CommonError(UserError):
    """One that all ranks have found together and raise alike: it is enough that rank 0 says it."""


class RanksMissing(RuntimeError):
    """Not all ranks came together. Nothing that a user has written need be wrong: a later start may be luckier."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest allowed word, or the whole choice where none is close."""
    choices = sorted(allowed)
    if close := if_near(word, choices):
        return close
    if not choices:
        return ""
    more = f" and {len(choices) - _SHOWN:,} more" if len(choices) > _SHOWN else ""
    return f"; allowed: {', '.join(choices[:_SHOWN])}{more}"


def if_near(word: str, names: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest name, and nothing where none is close.

    For files: what else lies in a folder is no choice that anybody made.
    """
    close = difflib.get_close_matches(word, sorted(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
