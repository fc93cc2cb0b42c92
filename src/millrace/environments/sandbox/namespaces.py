"""A box of the kernel's namespaces: own users, processes, network, and a root folder with read-only parts of the host.

It takes no privilege and no package, only that the machine lets an ordinary user make namespaces.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator

from millrace.environments.sandbox import kernel
from millrace.environments.sandbox.confine import NOBODY, become_nobody

SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin")
SYSTEM_FILES = ("/etc/ld.so.cache",)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
SCRATCH = "/tmp"

ROOT_SPOT = "/tmp"
"""Where the new root is mounted while it is built; the host's /tmp is hidden by it in this namespace alone."""
ROOT_OPTIONS = "size=1m,nr_inodes=256,mode=755"

KEPT_FLAGS = (
    (os.ST_NOSUID, kernel.MS_NOSUID),
    (os.ST_NODEV, kernel.MS_NODEV),
    (os.ST_NOEXEC, kernel.MS_NOEXEC),
    (os.ST_NOATIME, kernel.MS_NOATIME),
    (os.ST_NODIRATIME, kernel.MS_NODIRATIME),
    (os.ST_RELATIME, kernel.MS_RELATIME),
)
"""What a mount of the host has set must stay set when it is made read-only here."""


OCTAL = re.compile(rb"\\([0-7]{3})")
"""How the kernel writes blanks in the name of a mount."""


def interpreter_folder() -> str:
    """The running interpreter's installation, which programs import from."""
    return os.path.realpath(sys.base_prefix)


def enter_box() -> None:
    """Move this process into a new box. Children live in it; only children made after another `unshare` of processes
    have process numbers of their own."""
    prefix = interpreter_folder()
    os.chdir(prefix)  # kept as the way to it, should the user that is left have none
    become_nobody()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # or the maps below belong to root
    user, group = os.geteuid(), os.getegid()
    spaces = kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    kernel.unshare(kernel.CLONE_NEWUSER | spaces)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{NOBODY} {user} 1")
    _write("/proc/self/gid_map", f"{NOBODY} {group} 1")
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    os.umask(0o022)
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.lock_privileges()
    _build_root(prefix)


def mount_scratch(size: int, inodes: int) -> None:
    """A new, empty, limited /tmp for this mount namespace."""
    options = f"size={size},nr_inodes={inodes},mode=700,uid={NOBODY},gid={NOBODY}"
    kernel.mount("tmpfs", SCRATCH, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    os.chdir(SCRATCH)


def _build_root(prefix: str) -> None:
    kernel.mount("tmpfs", ROOT_SPOT, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, ROOT_OPTIONS)
    if not prefix.startswith("/usr/"):
        _bind(".", prefix)
    for folder in SYSTEM_FOLDERS:
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), ROOT_SPOT + folder)
        elif os.path.isdir(folder):
            _bind(folder, folder)
    for file in SYSTEM_FILES:
        if os.path.exists(file):
            _bind(file, file)
    for device in DEVICES:
        _bind(device, device, read_only=False)
    for folder in (SCRATCH, "/box"):
        os.makedirs(ROOT_SPOT + folder, exist_ok=True)
    if not os.path.lexists(ROOT_SPOT + sys.base_prefix):
        os.makedirs(os.path.dirname(ROOT_SPOT + sys.base_prefix), exist_ok=True)
        os.symlink(prefix, ROOT_SPOT + sys.base_prefix)
    os.chdir(ROOT_SPOT)
    kernel.pivot_root(".", ".")
    kernel.unmount(".")
    os.chdir("/")
    flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount(None, "/", None, flags)


def _bind(source: str, path: str, *, read_only: bool = True) -> None:
    """Show a folder or file of the host at `path` of the new root, with all that is mounted beneath."""
    target = ROOT_SPOT + path
    if os.path.lexists(target):
        return  # it came with a folder above it
    if stat.S_ISDIR(os.stat(source).st_mode):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    if read_only:
        for point in list(_mounts_beneath(target)):
            _make_read_only(point)


def _mounts_beneath(folder: str) -> Iterator[str]:
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            escaped = line.split(b" ")[4]
            point = os.fsdecode(OCTAL.sub(lambda match: bytes([int(match[1], 8)]), escaped))
            if point == folder or point.startswith(folder + "/"):
                yield point


def _make_read_only(point: str) -> None:
    set_now = os.statvfs(point).f_flag
    kept = sum(flag for was, flag in KEPT_FLAGS if set_now & was)
    flags = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV | kept
    kernel.mount(None, point, None, kernel.MS_REMOUNT | kernel.MS_BIND | flags)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
