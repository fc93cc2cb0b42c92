"""What a process gives up before it runs a program: descriptors, limits, capabilities, files, system calls."""

from __future__ import annotations

import fcntl
import os
import resource
import stat
import struct
from collections.abc import Sequence

from millrace.environments.sandbox import kernel
from millrace.environments.sandbox.run import Limits
from millrace.environments.sandbox.syscall_filter import Profile, build_filter

NOBODY = 65534
"""Who a supervisor that is root becomes, and who everybody is in the box."""

READ_FILE, READ_FOLDER, EXECUTE, WRITE_FILE = 1 << 2, 1 << 3, 1 << 0, 1 << 1
REMOVE_FILE, MAKE_FILE, TRUNCATE = 1 << 5, 1 << 8, 1 << 14
ACCESS_OF_VERSION = {3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Every access to files that Landlock of a version can refuse."""
NETWORK_SINCE, NETWORK_ACCESS = 4, 3
SCOPES_SINCE, SCOPES = 6, 3
"""Abstract sockets and signals."""
F_ADD_SEALS, SEALS = 1033, 0xF
"""No writing, growing, shrinking, and no change of seals."""


def leaves_root() -> bool:
    """Whether this process is root and can become an ordinary user. The root of a container that has no other user
    cannot; to the host it is an ordinary user already."""
    return os.geteuid() == 0 and all(_is_mapped(file) for file in ("/proc/self/uid_map", "/proc/self/gid_map"))


def become_nobody() -> None:
    """Leave root for an ordinary user: a program that is root of a namespace may still be root to the host's files."""
    if leaves_root():
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _is_mapped(file: str) -> bool:
    with open(file) as maps:
        ranges = [[int(word) for word in line.split()] for line in maps]
    return any(first <= NOBODY < first + count for first, _, count in ranges)


def close_from(first: int) -> None:
    """Close every descriptor from `first` on."""
    os.closerange(first, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 4096))


def arrange(descriptors: Sequence[int]) -> None:
    """Make these the descriptors from 0 on, in this order, and close all others."""
    free = max((*descriptors, len(descriptors))) + 1
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, free + place)
    for place in range(len(descriptors)):
        os.dup2(free + place, place)
    close_from(len(descriptors))


def memory_file(content: bytes) -> int:
    """Descriptor of a file in memory that nobody can change any more, at its beginning."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, F_ADD_SEALS, SEALS)
    return descriptor


def set_limits(limits: Limits, processes: int) -> None:
    """`processes` is what the kernel counts here, perhaps those of the user elsewhere among them."""
    for kind, value in (
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_STACK, limits.stack_bytes),
        (resource.RLIMIT_MEMLOCK, 64 << 10),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def allow_files_only(readable: Sequence[str], devices: Sequence[str], writable: str | None = None) -> None:
    """Landlock: nothing but reading beneath `readable`, reading and writing of `devices`, and plain files in the folder
    `writable`. What is not there is left out."""
    version = kernel.landlock_version()
    access = ACCESS_OF_VERSION[min(version, 5)]
    attributes = struct.pack("=Q", access)
    if version >= NETWORK_SINCE:
        attributes += struct.pack("=Q", NETWORK_ACCESS)
    if version >= SCOPES_SINCE:
        attributes += struct.pack("=Q", SCOPES)
    rules = kernel.landlock_create(attributes)
    files = READ_FILE | WRITE_FILE | TRUNCATE
    for paths, allowed in (
        (readable, READ_FILE | READ_FOLDER | EXECUTE),
        (devices, READ_FILE | WRITE_FILE),
        ([] if writable is None else [writable], files | READ_FOLDER | MAKE_FILE | REMOVE_FILE),
    ):
        for path in paths:
            _allow(rules, path, allowed)
    kernel.no_new_privileges()
    kernel.landlock_restrict(rules)
    os.close(rules)


def _allow(rules: int, path: str, access: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        folder = stat.S_ISDIR(os.fstat(beneath).st_mode)
        kernel.landlock_allow(rules, beneath, access if folder else access & ~READ_FOLDER)
    finally:
        os.close(beneath)


def refuse_calls(pid: int, *, profile: Profile = "program") -> None:
    """The last step: from here on the filter holds."""
    kernel.no_new_privileges()
    kernel.install_filter(build_filter(pid, profile))
