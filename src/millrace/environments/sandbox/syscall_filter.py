"""The seccomp filter of every run, as a BPF program for x86_64.

It lists what is refused, by numbers of the kernel's table for x86_64. Calls of another table (32-bit, x32) kill the
process; calls that came after 334 answer ENOSYS but for a few, so that what a later kernel brings is refused unseen.
Threads work; processes do not, but for a compiler's: one kill then ends a run and all that it started.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Literal

Profile = Literal["program", "compiler", "commands"]

MACHINE = "x86_64"
AUDIT_ARCH = 0xC000003E
X32_BIT = 0x40000000
LAST_OLD_CALL = 334
LATER_CALLS = (436, 437, 439, 441, 449)
"""close_range, openat2, faccessat2, epoll_pwait2, futex_waitv."""

CLONE = 56
CLONE_THREAD, CLONE_PARENT = 0x00010000, 0x00008000
CLONE_NEW = 0x7E020080
"""Every CLONE_NEW flag."""
IOCTL = 16
TERMINAL_REQUESTS = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX type into a terminal."""
OWNER_REQUESTS = (0x8901, 0x8902)
FCNTL = 72
OWNER_COMMANDS = (8, 10, 15)
"""FIOSETOWN, SIOCSPGRP, F_SETOWN, F_SETSIG and F_SETOWN_EX have the kernel send a signal to another process."""
PRCTL, PR_SET_PDEATHSIG = 157, 1
"""A run ends with its supervisor, and cannot ask not to."""
TGKILL, PRLIMIT, SCHED_SETAFFINITY = 234, 302, 203

REFUSED = {
    # processes
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "setpriority": 141,
    "sched_setparam": 142, "sched_setscheduler": 144, "sched_setattr": 314, "ioprio_set": 251,
    "personality": 135, "setns": 308, "unshare": 272, "acct": 163,
    # network
    "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "sendmsg": 46, "bind": 49, "listen": 50,
    "accept4": 288, "sendmmsg": 307,
    # mounts and files
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "swapon": 167, "swapoff": 168, "mknod": 133,
    "mknodat": 259, "quotactl": 179, "name_to_handle_at": 303, "open_by_handle_at": 304, "fanotify_init": 300,
    "fanotify_mark": 301, "uselib": 134, "ustat": 136, "sysfs": 139,
    # memory beside the address space
    "memfd_create": 319, "shmget": 29, "shmat": 30, "shmctl": 31, "shmdt": 67, "semget": 64, "semop": 65,
    "semctl": 66, "semtimedop": 220, "msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "mq_open": 240,
    "mq_unlink": 241, "mq_timedsend": 242, "mq_timedreceive": 243, "mq_notify": 244, "mq_getsetattr": 245,
    "vmsplice": 278, "mbind": 237, "set_mempolicy": 238, "migrate_pages": 256, "move_pages": 279,
    "io_setup": 206, "io_submit": 209, "userfaultfd": 323, "remap_file_pages": 216,
    # the machine
    "bpf": 321, "perf_event_open": 298, "add_key": 248, "request_key": 249, "keyctl": 250, "syslog": 103,
    "init_module": 175, "finit_module": 313, "delete_module": 176, "create_module": 174, "kexec_load": 246,
    "kexec_file_load": 320, "reboot": 169, "settimeofday": 164, "clock_settime": 227, "clock_adjtime": 305,
    "adjtimex": 159, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "modify_ldt": 154,
    "lookup_dcookie": 212, "nfsservctl": 180, "vhangup": 153, "_sysctl": 156,
}  # fmt: skip

SIGNALS = {"kill": 62, "tkill": 200, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297}
OWN_FILES = {
    "chmod": 90, "fchmod": 91, "fchmodat": 268, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260,
    "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198,
    "fremovexattr": 199, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280, "truncate": 76,
}  # fmt: skip
"""What Landlock leaves open to the owner of a file."""
STARTING = {"fork": 57, "vfork": 58}
LEAVING_THE_GROUP = {"setpgid": 109, "setsid": 112}

LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCH, ARGUMENTS = 0, 4, 16
KILL, ALLOW, REFUSE = 0x80000000, 0x7FFF0000, 0x00050000


def filter_problem() -> str | None:
    """Why there is no filter for this machine, or None."""
    machine = os.uname().machine
    return None if machine == MACHINE else f"its list of system calls is for {MACHINE}, and this machine is {machine}"


def build_filter(pid: int, profile: Profile = "program") -> bytes:
    """The filter of the process `pid` (as it sees itself), eight bytes an instruction.

    A program may send signals to its own threads and set its own limits, and do neither to others. A compiler may start
    processes, which stay in its group, so that one signal ends them all. Commands are for boxes with processes, network
    and files of their own: they may signal one another and own their files.
    """
    refuse = _return(REFUSE | errno.EPERM)
    unknown = _return(REFUSE | errno.ENOSYS)
    code = [_load(ARCH), _jump(JUMP_EQUAL, AUDIT_ARCH, 1, 0), _return(KILL), _load(NUMBER)]
    code += [_jump(JUMP_GREATER_EQUAL, X32_BIT, 0, 1), _return(KILL)]
    code += [_jump(JUMP_GREATER_EQUAL, LAST_OLD_CALL + 1, 0, len(LATER_CALLS) + 1)]
    code += [_jump(JUMP_EQUAL, call, len(LATER_CALLS) - place, 0) for place, call in enumerate(LATER_CALLS)]
    code += [unknown]
    for call in _refused(profile).values():
        code += [_jump(JUMP_EQUAL, call, 0, 1), refuse]
    code += _when(CLONE, _clone_rules(refuse, threads_only=profile == "program"))
    code += _when(IOCTL, _refuse_requests(TERMINAL_REQUESTS + OWNER_REQUESTS, refuse))
    code += _when(FCNTL, _refuse_requests(OWNER_COMMANDS, refuse))
    code += _when(PRCTL, [_load(_argument(0)), _jump(JUMP_EQUAL, PR_SET_PDEATHSIG, 1, 0), _return(ALLOW), refuse])
    if profile != "commands":
        for call in (PRLIMIT, SCHED_SETAFFINITY):
            code += _when(call, _allow_targets((0, pid), refuse))
        code += _when(TGKILL, _allow_targets((pid,), refuse))
    code += [_return(ALLOW)]
    return b"".join(code)


def _refused(profile: Profile) -> dict[str, int]:
    match profile:
        case "program":
            return REFUSED | SIGNALS | OWN_FILES | STARTING
        case "compiler":
            return REFUSED | SIGNALS | OWN_FILES | LEAVING_THE_GROUP
    return REFUSED


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", LOAD, 0, 0, offset)


def _jump(kind: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", kind, if_true, if_false, value)


def _return(action: int) -> bytes:
    return struct.pack("=HBBI", RETURN, 0, 0, action)


def _argument(index: int) -> int:
    """Offset of an argument's lower word."""
    return ARGUMENTS + 8 * index


def _when(call: int, block: list[bytes]) -> list[bytes]:
    """A block for one call; it must end in a return."""
    return [_jump(JUMP_EQUAL, call, 0, len(block)), *block]


def _clone_rules(refuse: bytes, *, threads_only: bool) -> list[bytes]:
    """No namespaces; processes, where they are allowed, are children."""
    flags = _load(_argument(0))
    if not threads_only:
        return [flags, _jump(JUMP_ANY_BIT, CLONE_NEW | CLONE_PARENT, 0, 1), refuse, _return(ALLOW)]
    code = [flags, _jump(JUMP_ANY_BIT, CLONE_NEW, 1, 0), _jump(JUMP_ANY_BIT, CLONE_THREAD, 1, 0)]
    return [*code, refuse, _return(ALLOW)]


def _refuse_requests(requests: tuple[int, ...], refuse: bytes) -> list[bytes]:
    """Refuse a call whose second argument is one of `requests`."""
    tests = [_jump(JUMP_EQUAL, value, len(requests) - place, 0) for place, value in enumerate(requests)]
    return [_load(_argument(1)), *tests, _return(ALLOW), refuse]


def _allow_targets(targets: tuple[int, ...], refuse: bytes) -> list[bytes]:
    """Refuse a call whose first argument is none of `targets`."""
    tests = [_jump(JUMP_EQUAL, value, len(targets) - place, 0) for place, value in enumerate(targets)]
    return [_load(_argument(0)), *tests, refuse, _return(ALLOW)]
