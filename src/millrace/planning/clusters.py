"""Which cluster file is meant: a name in slurm/clusters/, or a path."""

from __future__ import annotations

from pathlib import Path

from millrace.config.cluster import ClusterConfig
from millrace.config.errors import ConfigError
from millrace.config.loading import load_cluster

FOLDER = Path("slurm") / "clusters"


def find_cluster(name_or_file: str) -> Path:
    """The file of a cluster. Names are looked for where one stands and in the repository that Millrace runs from.

    Raises ConfigError with the names that there are.
    """
    if Path(name_or_file).is_file():
        return Path(name_or_file)
    folders = [Path.cwd() / FOLDER, Path(__file__).resolve().parents[3] / FOLDER]
    for folder in folders:
        if (file := folder / f"{name_or_file}.yaml").is_file():
            return file
    names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    there = f"there are {', '.join(names)}" if names else f"there is no {FOLDER} here"
    raise ConfigError(f"no cluster file or name is {name_or_file!r}; {there}, or give the path of a file")


def cluster_named(name_or_file: str) -> ClusterConfig:
    """The cluster of a file or of a name. Raises ConfigError."""
    return load_cluster(find_cluster(name_or_file))
