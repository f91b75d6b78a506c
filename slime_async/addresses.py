"""Which addresses others can reach."""

from __future__ import annotations

import ipaddress


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
