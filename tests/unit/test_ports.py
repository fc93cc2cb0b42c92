import random
import socket
import struct
from pathlib import Path

import pytest

from millrace import ports
from millrace.ports import free_port, hold_port, port_of

HOST = "127.0.0.1"
IP_LOCAL_PORT_RANGE = 51  # linux/in.h, since 6.3: the kernel's own range for one socket


def kernels_range() -> range:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return range(low, high + 1)


def one_of_the_kernels() -> int:
    with socket.socket() as asker:
        asker.bind((HOST, 0))
        return port_of(asker)


def confine(asker: socket.socket, port: int) -> None:
    """Leave the kernel this one port of its range when it chooses for `asker`."""
    try:
        asker.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
    except OSError:
        pytest.skip("this kernel has one range for all sockets (Linux before 6.3)")


def test_a_server_listens_on_the_port_that_is_held_for_it_again_and_again() -> None:
    with hold_port(HOST) as holder:
        for _ in range(3):
            with (
                socket.create_server((HOST, port_of(holder))) as server,
                socket.create_connection((HOST, port_of(holder))) as client,
                server.accept()[0] as accepted,
            ):
                client.sendall(b"served")
                assert accepted.recv(6) == b"served"


def test_who_asks_for_a_held_port_without_sharing_is_refused_until_it_is_let_go() -> None:
    holder = hold_port(HOST)
    port = port_of(holder)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((HOST, port))
    with pytest.raises(OSError, match="in use"):
        hold_port(HOST, port)
    holder.close()
    hold_port(HOST, port).close()


def test_nobody_who_asks_for_any_port_gets_one_that_is_held() -> None:
    port = one_of_the_kernels()
    with hold_port(HOST, port):
        for sharing in (0, 1):
            with socket.socket() as asker:
                asker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, sharing)
                confine(asker, port)
                with pytest.raises(OSError, match="in use"):
                    asker.bind((HOST, 0))
    with socket.socket() as asker:  # the same without it, or the above shows nothing
        confine(asker, port)
        asker.bind((HOST, 0))
        assert port_of(asker) == port


def test_a_connection_does_not_go_out_from_a_port_that_is_held() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = one_of_the_kernels()
        with hold_port(HOST, port), socket.socket() as client:
            confine(client, port)
            with pytest.raises(OSError, match="assign"):
                client.connect(server.getsockname())
        with socket.socket() as client:
            confine(client, port)
            client.connect(server.getsockname())
            assert port_of(client) == port


def test_free_ports_are_none_that_the_kernel_gives_out_by_itself() -> None:
    chosen = {free_port() for _ in range(200)}
    assert len(chosen) > 150
    assert not chosen & set(kernels_range())
    assert min(chosen) >= 10_000


def test_ports_neither_follow_from_a_seed_nor_move_a_runs_random_state() -> None:
    chosen = set[int]()
    for _ in range(3):
        random.seed(5)
        before = random.getstate()
        chosen |= {free_port() for _ in range(2)}
        assert random.getstate() == before
    assert len(chosen) > 2


@pytest.mark.parametrize("given_out", ["1024\t65535", "10500\t65500"])
def test_where_the_kernel_gives_out_nearly_every_port_any_free_one_is_chosen(
    given_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ip_local_port_range"
    file.write_text(f"{given_out}\n")
    monkeypatch.setattr(ports, "KERNELS_RANGE", file)
    assert max(free_port() for _ in range(50)) > 33_000


def test_ports_above_the_kernels_range_will_do_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ip_local_port_range"
    file.write_text("9000\t40000\n")
    monkeypatch.setattr(ports, "KERNELS_RANGE", file)
    assert min(free_port() for _ in range(50)) > 40_000


def test_a_host_that_is_elsewhere_has_no_port_here() -> None:
    with pytest.raises(OSError, match="assign"):
        free_port("192.0.2.1")
