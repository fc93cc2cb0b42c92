"""Messages between a supervisor and its zygote: lengths, a header in JSON, and bytes; and what of them is in JSON."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from millrace.environments.sandbox.run import Batch, Binary, Command, CppProgram, Program, Run, Work

LENGTHS = struct.Struct("=II")


def send(channel: socket.socket, header: Mapping[str, Any], payload: bytes = b"") -> None:
    head = json.dumps(header).encode()
    channel.sendall(LENGTHS.pack(len(head), len(payload)) + head + payload)


def receive(channel: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """The next message, or None when the other side has closed. Raises TimeoutError by the socket's time limit."""
    lengths = _read(channel, LENGTHS.size)
    if lengths is None:
        return None
    head_size, payload_size = LENGTHS.unpack(lengths)
    head, payload = _read(channel, head_size), _read(channel, payload_size)
    if head is None or payload is None:
        return None
    return json.loads(head), payload


def cut(payload: bytes, sizes: Sequence[int]) -> list[bytes]:
    """The parts that a payload was put together from."""
    ends = list(accumulate(sizes))
    return [payload[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _read(channel: socket.socket, size: int) -> bytes | None:
    pieces = bytearray()
    while len(pieces) < size:
        piece = channel.recv(min(size - len(pieces), 1 << 20))
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)


def work_to_wire(work: Work) -> tuple[dict[str, Any], list[bytes]]:
    """What a box is asked to do, and the files that the process which does it holds open."""
    match work:
        case Batch(program, inputs, mark):
            return {"kind": "batch", "program": program._asdict(), "mark": mark}, list(inputs)
        case Binary(content):
            return {"kind": "binary"}, [content]
        case CppProgram(source):
            return {"kind": "compile", "source": source}, []
        case Command(argv):
            return {"kind": "command", "argv": list(argv)}, []
        case Program():
            return {"kind": "program", "program": work._asdict()}, []


def run_to_wire(run: Run) -> tuple[dict[str, Any], bytes]:
    header = {
        "ending": run.ending,
        "status": run.status,
        "stdout_bytes": len(run.stdout),
        "cpu_s": run.cpu_s,
        "wall_s": run.wall_s,
        "peak_bytes": run.peak_bytes,
    }
    return header, run.stdout + run.stderr


def run_from_wire(header: Mapping[str, Any], payload: bytes) -> Run:
    cut = header["stdout_bytes"]
    return Run(
        header["ending"],
        header["status"],
        payload[:cut],
        payload[cut:],
        header["cpu_s"],
        header["wall_s"],
        header["peak_bytes"],
    )
