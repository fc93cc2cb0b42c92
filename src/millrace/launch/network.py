"""Where a node of a job is reached by the others, and through which of its network interfaces."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from millrace.errors import MillraceError


class NetworkError(MillraceError):
    """A node does not find its own address."""


def address_of(host: str, interface: str | None) -> str:
    """IPv4 address of this node: that of `interface` where one is named, else what its name resolves to."""
    if interface is not None:
        known = psutil.net_if_addrs()
        if interface not in known:
            raise NetworkError(
                f"network.interface {interface} is not on {host}, which has {', '.join(sorted(known))}; correct it in "
                "the cluster file"
            )
        for entry in known[interface]:
            if entry.family == socket.AF_INET:
                return str(entry.address)
        raise NetworkError(
            f"network.interface {interface} of {host} has no IPv4 address; name another in the cluster file"
        )
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise NetworkError(
            f"the name {host} does not resolve on that node ({error}); set network.interface in the cluster file"
        ) from error


def interface_of(address: str) -> str:
    """The network interface in whose network an address of this node lies.

    Gloo and NCCL take the name of an interface. Raises NetworkError where none has it.
    """
    asked = ipaddress.ip_address(address)
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and entry.netmask:
                network = ipaddress.ip_network(f"{entry.address}/{entry.netmask}", strict=False)
                if str(entry.address) == address or (network.is_loopback and asked in network):
                    return name
    raise NetworkError(f"no network interface of this node has {address}; set network.interface in the cluster file")
