"""A check that this host has the network interfaces that the environment names for gloo and NCCL.

Without the check torch raises an obscure error on one rank, while the other ranks wait for it.
"""

import socket
from collections.abc import Mapping

from megalite.errors import UserError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def require_interfaces(env: Mapping[str, str], backend: str) -> None:
    """Raise UserError where the environment gives `backend`, gloo or nccl, interfaces that this host does not have.

    gloo takes a list of names. NCCL takes a list of prefixes of names; after ``=`` a list of whole names, after ``^`` a
    list of prefixes that it must not use.
    """
    try:
        present = [name for _, name in socket.if_nameindex()]
    except OSError:
        return  # the host does not list its interfaces
    if backend == "gloo" and len(env.get(GLOO, "")) > 1:  # as torch reads it
        missing = [name for name in env[GLOO].split(",") if name not in present]
        if missing:
            raise UserError(_message(GLOO, env[GLOO], f"has no interface {missing[0]!r}", present))
    if backend == "nccl" and (asked := env.get(NCCL, "")):
        kind, names = (asked[0], asked[1:]) if asked[0] in "^=" else ("", asked)
        wanted = [name.split(":")[0] for name in names.split(",") if name]

        def fits(name: str) -> bool:
            return any(name == text if kind == "=" else name.startswith(text) for text in wanted)

        if not any(fits(name) != (kind == "^") for name in present):
            raise UserError(_message(NCCL, asked, "has no matching interface", present))


def _message(variable: str, value: str, problem: str, present: list[str]) -> str:
    interfaces = ", ".join(sorted(present))
    return (
        f"environment: {variable}={value}: {socket.gethostname()} {problem}; it has {interfaces}: set one of them, or "
        f"unset {variable}"
    )
