"""Connectivity test: each rank connects to the others with plain sockets, at the addresses of their process groups.

A gloo or NCCL group that cannot form waits, and names neither the ranks nor the cause: a firewall between two hosts, or
a host name that resolves to the loopback device, as in Debian's /etc/hosts.
"""

import os
import socket
import struct
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

CONNECT_SECONDS = 5.0
ALL_PAIRS = 64
"""The largest number of ranks for which every pair is tested; with more ranks, each tests the ranks 1, 2, 4, ... on."""
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True)
class Listener:
    """The address at which a rank listens; it answers with `token`, so that no other program is taken for the rank."""

    rank: int
    host: str
    address: str
    port: int
    token: str

    def to_json(self) -> dict[str, Any]:
        """Return the keyword arguments of `Listener`."""
        return asdict(self)


@contextmanager
def listening(rank: int, address: str) -> Iterator[Listener]:
    """Listen at `address`, and send the token to every client, in a thread while the body runs."""
    token = uuid.uuid4().hex
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=1024) as server:
        thread = threading.Thread(target=_answer, args=(server, token), name="answer-ranks", daemon=True)
        thread.start()
        yield Listener(rank, socket.gethostname(), address, server.getsockname()[1], token)
        with suppress(OSError):  # ends the thread's wait in accept
            server.shutdown(socket.SHUT_RDWR)
        thread.join(CONNECT_SECONDS)


def _answer(server: socket.socket, token: str) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection, suppress(OSError):
            connection.sendall(token.encode())


def failed_connections(here: Listener, listeners: Sequence[Listener]) -> list[str]:
    """Connect to this rank's peers; return a message with the reason and a fix for each failure."""
    chosen = [listeners[rank] for rank in peers(here.rank, len(listeners))]
    with ThreadPoolExecutor(16, thread_name_prefix="connect") as pool:
        return [failure for failure in pool.map(lambda there: _connect(here, there), chosen) if failure]


def peers(rank: int, world_size: int) -> list[int]:
    """Return the ranks to which a rank connects.

    >>> peers(1, 4)
    [0, 2, 3]
    """
    if world_size <= ALL_PAIRS:
        return [other for other in range(world_size) if other != rank]
    distances = (1 << power for power in range((world_size - 1).bit_length()))
    return sorted({(rank + distance) % world_size for distance in distances} - {rank})


def _connect(here: Listener, there: Listener) -> str | None:
    address = f"{there.address}:{there.port}"
    failure = f"rank {here.rank} on {here.host} does not reach rank {there.rank} on {there.host} at {address}"
    try:
        with socket.create_connection((there.address, there.port), timeout=CONNECT_SECONDS) as connection:
            if connection.recv(64).decode(errors="replace") == there.token:
                return None
            reason = "another program answers"
    except OSError as error:
        reason = error.strerror or str(error)
    return f"{failure}: {reason}; {_fix(here, there)}"


def _fix(here: Listener, there: Listener) -> str:
    if here.host != there.host and there.address.startswith(("127.", "::1")):
        return (
            f"that is the loopback device of {there.host}: set GLOO_SOCKET_IFNAME to its network interface, or give "
            "its name the network's address in /etc/hosts"
        )
    return "check the firewall and the routes between them, and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"


def own_address(device: torch.device, master_address: str) -> str:
    """Return the address at which this rank's process groups will listen.

    gloo uses the interface GLOO_SOCKET_IFNAME, else the address of the host's name, else the loopback device. For NCCL
    this function assumes NCCL_SOCKET_IFNAME if that is the name of an interface, else the interface of the route to the
    master.
    """
    variable = "NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME"
    if address := _address_of_interface(os.environ.get(variable, "")):
        return address
    return _address_towards(master_address) if device.type == "cuda" else _address_of_name()


def unknown_interfaces(here: Listener) -> Iterator[str]:
    """Yield a message for each interface of GLOO_SOCKET_IFNAME that this host lacks; gloo's own error comes later."""
    known = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in known:
            yield (
                f"rank {here.rank} on {here.host}: GLOO_SOCKET_IFNAME={name} is not an interface of this host; use one "
                f"of {', '.join(known)}"
            )


def _address_of_interface(name: str) -> str | None:
    if sys.platform != "linux" or name not in [known for _, known in socket.if_nameindex()]:
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None


def _address_towards(master_address: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((master_address, 9))  # sends nothing
        return probe.getsockname()[0]
    return _address_of_name()


def _address_of_name() -> str:
    with suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            with socket.socket(family) as probe, suppress(OSError):
                probe.bind((address[0], 0))
                return str(address[0])
    return "127.0.0.1"
