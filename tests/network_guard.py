"""No test reaches the network: an audit hook refuses every address but those of this machine."""

from __future__ import annotations

import ipaddress
import sys
from typing import Any

__all__ = ["NetworkUsed", "attempts", "install"]

attempts: list[str] = []
"""What was refused, also where the code that tried it has caught the error."""

_CONNECTING = {"socket.connect", "socket.sendto", "socket.sendmsg"}
_LOOKING_UP = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
_HERE = {None, "", b"", "localhost", b"localhost"}


class NetworkUsed(RuntimeError):
    """Something tried to leave this machine."""


def install() -> None:
    """Watch the process from now on; audit hooks stay for its whole life."""
    sys.addaudithook(_watch)


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event in _CONNECTING:
        address = args[1] if len(args) > 1 else None
        host = address[0] if isinstance(address, tuple) else None  # else a file of this machine
    elif event in _LOOKING_UP:
        host = args[0]
    else:
        return
    if not _is_here(host):
        attempts.append(f"{event}: {host!r}")
        raise NetworkUsed(f"{event} of {host!r}: tests and margeq itself do without a network")


def _is_here(host: Any) -> bool:
    if host in _HERE:
        return True
    try:
        return ipaddress.ip_address(host if isinstance(host, str) else host.decode()).is_loopback
    except ValueError:
        return False
