"""Room for open files: each request under way, each agent's connection and each open interpreter takes some."""

from __future__ import annotations

import resource

ENOUGH = 1 << 15
"""More than thousands of episodes take, and few enough for a sandbox that has to close one number after the other."""


def allow_many_files() -> None:
    """Raise this process's soft limit, which is 1024 almost everywhere, as far as the hard one lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(ENOUGH, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
