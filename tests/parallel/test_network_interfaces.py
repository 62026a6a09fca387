"""Network interfaces that the environment names are looked for before any rank waits for another."""

import pytest

from megalite.errors import UserError
from megalite.parallel.network_interfaces import require_interfaces


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(1, "lo"), (2, "eth0"), (3, "ib0"), (4, "ib1")]
    monkeypatch.setattr("megalite.parallel.network_interfaces.socket.if_nameindex", lambda: found)


@pytest.mark.parametrize(
    ("backend", "variable", "value", "missing"),
    [
        ("gloo", "GLOO_SOCKET_IFNAME", "eth0", None),
        ("gloo", "GLOO_SOCKET_IFNAME", "ib0,ib1", None),
        ("gloo", "GLOO_SOCKET_IFNAME", "", None),
        ("gloo", "GLOO_SOCKET_IFNAME", "eth1", "has no interface 'eth1'"),
        ("gloo", "GLOO_SOCKET_IFNAME", "ib", "has no interface 'ib'"),
        ("gloo", "GLOO_SOCKET_IFNAME", "eth0,wlan0", "has no interface 'wlan0'"),
        ("gloo", "GLOO_SOCKET_IFNAME", "eth0, ib0", "has no interface ' ib0'"),
        ("gloo", "NCCL_SOCKET_IFNAME", "eth1", None),
        ("nccl", "GLOO_SOCKET_IFNAME", "eth1", None),
        ("nccl", "NCCL_SOCKET_IFNAME", "", None),
        ("nccl", "NCCL_SOCKET_IFNAME", "ib", None),
        ("nccl", "NCCL_SOCKET_IFNAME", "=ib", "has no"),
        ("nccl", "NCCL_SOCKET_IFNAME", "=ib0:2", None),
        ("nccl", "NCCL_SOCKET_IFNAME", "wlan,eth", None),
        ("nccl", "NCCL_SOCKET_IFNAME", "wlan", "has no"),
        ("nccl", "NCCL_SOCKET_IFNAME", "^docker,lo", None),
        ("nccl", "NCCL_SOCKET_IFNAME", "^lo,eth,ib", "has no"),
    ],
)
def test_interfaces(backend: str, variable: str, value: str, missing: str | None) -> None:
    if missing is None:
        require_interfaces({variable: value}, backend)
        return
    with pytest.raises(UserError) as refused:
        require_interfaces({variable: value}, backend)
    assert str(refused.value).startswith(f"environment: {variable}={value}: ")
    assert missing in str(refused.value)
    assert "eth0, ib0, ib1, lo" in str(refused.value)
    assert f"unset {variable}" in str(refused.value)


def test_a_host_that_does_not_tell_its_interfaces_is_asked_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("no netlink here")

    monkeypatch.setattr("megalite.parallel.network_interfaces.socket.if_nameindex", refuse)
    require_interfaces({"GLOO_SOCKET_IFNAME": "eth9"}, "gloo")
