"""Which box this machine can make: the first tier whose canary comes home.

The canary is a program that tries what programs must not do. A tier is taken only if every try fails in it, the
interpreter works, and a program that never ends is killed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping

from millrace.environments.sandbox.boxes import Box, Unavailable, ZygoteBox
from millrace.environments.sandbox.run import Limits, Program, SandboxFault
from millrace.environments.sandbox.single_boxes import BubblewrapBox, LandlockBox, OpenBox
from millrace.errors import MillraceError

log = logging.getLogger("millrace.environments")

TIERS: Mapping[str, Callable[[], Box]] = {"zygote": ZygoteBox, "bubblewrap": BubblewrapBox, "landlock": LandlockBox}
"""From the fastest to what works on most machines."""

UNSAFE = "unsafe"

CANARY_LIMITS = Limits(wall_s=20.0, cpu_s=10, memory_bytes=512 << 20)
ENDLESS_LIMITS = CANARY_LIMITS._replace(wall_s=0.1)

CANARY = """
import ctypes, json, os, socket, struct, threading
from fractions import Fraction

def allowed(attempt):
    try:
        attempt()
    except (OSError, MemoryError):
        return False
    return True

def fork():
    if os.fork() == 0:
        os._exit(0)

def write(path):
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))

def capabilities():
    held = ctypes.create_string_buffer(24)
    libc.syscall(125, struct.pack("=Ii", 0x20080522, 0), held)
    return any(held.raw)

libc, worked = ctypes.CDLL(None), []
thread = threading.Thread(target=lambda: worked.append(Fraction(1, 3) * 3 == 1))
thread.start()
thread.join()
print(json.dumps({
    "interpreter": worked == [True] and input() == "ping",
    "reads /etc/passwd": allowed(lambda: open("/etc/passwd").close()),
    "reads /proc": allowed(lambda: open("/proc/self/status").close()),
    "lists /home": allowed(lambda: os.listdir("/home")),
    "writes in its folder": allowed(lambda: write("canary")),
    "writes in /tmp": allowed(lambda: write("/tmp/millrace-canary")),
    "writes in /dev/shm": allowed(lambda: write("/dev/shm/millrace-canary")),
    "opens a socket": allowed(socket.socket),
    "starts a process": allowed(fork),
    "signals others": allowed(lambda: os.kill(-1, 0)),
    "takes all memory": allowed(lambda: bytearray(600 << 20)),
    "holds a capability": capabilities(),
    "sees an environment": sorted(os.environ.keys() - {"PYTHONHASHSEED", "LC_ALL", "PWD"}) != [],
    "gains privileges": libc.prctl(39, 0, 0, 0, 0) != 1,
}))
"""


class NoSandboxError(MillraceError):
    """Programs cannot be run safely here."""


def open_tier(name: str) -> Box:
    """A box of a tier, with its canary back.

    Raises:
        Unavailable: the tier cannot be used here.
    """
    if name == UNSAFE:
        return OpenBox()
    box = TIERS[name]()
    try:
        if problem := canary_problem(box):
            raise Unavailable(problem)
    except Unavailable:
        box.close()
        raise
    return box


def canary_problem(box: Box) -> str | None:
    """What a box does not keep from a program, or None."""
    try:
        run = box.run(Program(CANARY), b"ping\n", CANARY_LIMITS)
        endless = box.run(Program("while True: pass"), b"", ENDLESS_LIMITS)
    except SandboxFault as error:
        return str(error)
    if not run.clean:
        return f"the canary ended with {run.ending} {run.status}: {run.stderr.decode(errors='replace')[-300:].strip()}"
    found = json.loads(run.stdout)
    if not found.pop("interpreter"):
        return "the interpreter does not work in the box"
    if broken := [what for what, so in found.items() if so]:
        return f"a program in the box {', '.join(broken)}"
    return None if endless.ending == "wall" else f"a program that never ends ended with {endless.ending}"


def choose_tier(wanted: str) -> str:
    """The tier to use: `wanted`, or with `auto` the first that this machine can make. `unsafe` is taken with a warning.

    Raises:
        NoSandboxError: there is none; why, for each.
    """
    if wanted == UNSAFE:
        log.warning(
            "sandbox.tier is unsafe: programs that the model writes run as this user, with its files and its network; "
            "use it only where their author is trusted"
        )
        return UNSAFE
    reasons = []
    for name in TIERS if wanted == "auto" else (wanted,):
        try:
            open_tier(name).close()
        except Unavailable as error:
            reasons.append(f"{name}: {error}")
        else:
            return name
    raise NoSandboxError(
        f"programs cannot be run safely on this machine ({'; '.join(reasons)}); allow user namespaces, install "
        "bubblewrap, or take a kernel with Landlock (6.2 or later)"
    )
