"""Network interfaces that the environment names for gloo and NCCL: whether this host has them.

Where it has not, torch raises from deep inside, on one rank, while the others wait for it.
"""

import socket
from collections.abc import Mapping

from megalite.errors import UserError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def require_interfaces(env: Mapping[str, str], backend: str) -> None:
    """Raise UserError where `backend`, gloo or nccl, is to use network interfaces that this host has not.

    gloo takes a list of names. NCCL takes a list of beginnings of names; behind ``=`` of whole names, behind ``^`` of
    those that it is not to use.
    """
    try:
        present = [name for _, name in socket.if_nameindex()]
    except OSError:
        return  # a host that does not tell
    if backend == "gloo" and len(env.get(GLOO, "")) > 1:  # as torch reads it
        missing = [name for name in env[GLOO].split(",") if name not in present]
        if missing:
            raise UserError(_refusal(GLOO, env[GLOO], f"has no interface {missing[0]!r}", present))
    if backend == "nccl" and (asked := env.get(NCCL, "")):
        kind, names = (asked[0], asked[1:]) if asked[0] in "^=" else ("", asked)
        wanted = [name.split(":")[0] for name in names.split(",") if name]

        def fits(name: str) -> bool:
            return any(name == one if kind == "=" else name.startswith(one) for one in wanted)

        if not any(fits(name) != (kind == "^") for name in present):
            raise UserError(_refusal(NCCL, asked, "has no interface that this leaves", present))


def _refusal(variable: str, value: str, found: str, present: list[str]) -> str:
    has = ", ".join(sorted(present))
    return (
        f"environment: {variable}={value}: {socket.gethostname()} {found}; it has {has}: set one of them, or unset "
        f"{variable}"
    )
