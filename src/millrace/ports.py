"""TCP ports of this machine for servers that listen a while after their port is chosen, mostly in another process.

In that while a port can be lost: the kernel gives out the free ones of its own range to whoever asks for just any port,
and to every connection that goes out. So ports are taken from outside that range, and held until the server has ended.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

FIRST, LAST = 10_000, 65_535
"""Lower ports are those of well-known services."""
KERNELS_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
TRIES = 1000
CHANCE = random.SystemRandom()
"""None that a run seeds and its checkpoints hold: from one seed two runs would choose the same ports at one time."""


def hold_port(host: str, port: int | None = None) -> socket.socket:
    """A socket that holds a port of `host` while it is open, a free one if none is named, and never listens.

    A server that sets SO_REUSEADDR, as servers do, may bind the port beside it. Raises OSError for one that is taken
    and for a host that is not this machine.
    """
    ports = [*CHANCE.sample(_outside_kernels_range(), TRIES), 0] if port is None else [port]
    for tried in ports:
        holder = socket.socket()
        try:
            holder.bind((host, tried))  # not beside another holder: the option comes after
        except OSError:
            holder.close()
            if tried == ports[-1]:
                raise
        else:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return holder
    raise AssertionError("the last try returns or raises")


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host` that nobody has now, held for nobody: for what listens soon, or is told it on another node.

    Raises OSError for a host that is not this machine.
    """
    with hold_port(host) as holder:
        return port_of(holder)


def port_of(holder: socket.socket) -> int:
    return int(holder.getsockname()[1])


def _outside_kernels_range() -> list[int]:
    """Ports that the kernel gives to nobody who does not name them; all of them where it may give out every one."""
    low, high = map(int, KERNELS_RANGE.read_text(encoding="ascii").split())
    outside = [*range(FIRST, low), *range(max(high + 1, FIRST), LAST + 1)]
    return outside if len(outside) >= TRIES else [*range(FIRST, LAST + 1)]
