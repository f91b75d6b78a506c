"""Which addresses others can reach, and what this machine's own one is."""

from __future__ import annotations

import ipaddress
import socket

ANYWHERE = ("192.0.2.1", 9)
"""Reserved for documentation: nobody is there, but the way leads through the interface with the default route"""


def is_loopback(address: str) -> bool:
    """Whether ``tcp://HOST:PORT`` can be reached from this machine only. Names are not looked up: but for
    ``localhost``, a name, an interface or ``*`` may be reachable from anywhere."""
    scheme, _, rest = address.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    host = rest.rsplit(":", 1)[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split(address: str) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return host.strip("[]"), int(port)


def own_address(towards: str = "") -> str:
    """This machine's IP address, as whoever is at ``towards`` (``tcp://HOST:PORT``) sees it; nothing is sent.

    Without ``towards``, the address of its name, or, where that is loopback, of the interface with the default route.
    """
    if not towards:
        try:
            address = socket.gethostbyname(socket.gethostname())
        except OSError:
            address = "127.0.0.1"
        return address if not ipaddress.ip_address(address).is_loopback else _source_address(ANYWHERE)
    host, port = split(towards)
    return "127.0.0.1" if is_loopback(towards) else _source_address((host, port or ANYWHERE[1]))


def connectable(address: str) -> str:
    """What others connect to when the hub listens at ``address``: ``tcp://0.0.0.0:7000`` is no place to go to."""
    host, port = split(address)
    if host not in ("0.0.0.0", "::", "*"):
        return address
    return f"tcp://{own_address()}:{port}"


def _source_address(peer: tuple[str, int]) -> str:
    family = socket.AF_INET6 if ":" in peer[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(peer)
        except OSError:  # no route: a machine without a network
            return "127.0.0.1"
        return str(probe.getsockname()[0])
