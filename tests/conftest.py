"""Puts this folder on the import path, so that every test finds `tiny_checkpoints` and its like, and shares the tests
out where several processes run them (`pytest -n 2`)."""

from __future__ import annotations

from typing import Any

import pytest

TOGETHER = {
    "tests/e2e/": "engines",  # one engine stands for all of them
    "tests/slurm/": "machine",  # one cluster, and packages that one apt-get at a time installs
    "tests/unit/environments/": "machine",
}
"""What one process runs, one test after the other; of everything else, a file."""
ORDER = ("engines", "machine", "tests/unit/", "tests/converters/", "tests/recipes/", "tests/distributed/")
"""What takes longest begins. The cluster mostly waits and leaves its core to the engines; ranks want both cores."""


def group_of(nodeid: str) -> str:
    return next((group for folder, group in TOGETHER.items() if nodeid.startswith(folder)), nodeid.partition("::")[0])


def place_of(group: str) -> int:
    return next((place for place, first in enumerate(ORDER) if group.startswith(first)), len(ORDER))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a process of several
        items.sort(key=lambda item: place_of(group_of(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class InGroups(LoadScopeScheduling):
        """Gives a process that has nothing to do the next group."""

        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return InGroups(config, log)
