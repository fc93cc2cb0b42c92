"""A run as an experiment of NeMo-Run: the same nodes and commands as `launch.slurm`, given to one of its executors.

    with experiment(recipe, "slurm", cluster="my-site") as exp:
        exp.run()

With a SlurmExecutor a task is the job of `launch.slurm`: one command on each node of the placement. With any other
executor it is `millrace run`, on one node. NeMo-Run has dependencies of its own, some of which contradict vLLM's, so it
lives in an environment that launches and does not train (`constraints/nemo-run.sh`); the cluster file's `python` names
the interpreter that trains. Importing this module needs NeMo-Run.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nemo_run as run
from invoke.exceptions import UnexpectedExit
from nemo_run.config import get_nemorun_home
from nemo_run.core.tunnel.client import LocalTunnel

from millrace.config.cluster import ClusterConfig
from millrace.config.errors import ConfigError
from millrace.config.rules import require_runnable
from millrace.config.schema import Recipe
from millrace.errors import MillraceError
from millrace.launch.run_dir import RECIPE, locked
from millrace.launch.slurm import Launch, jobs, mounts, node_command, prepare, require_free, write_for_nodes
from millrace.launch.starting import Options, foresee, start

RETRIES = 10
"""How often a job is put back into the queue, which it asks for before its time limit as well as when it fails."""
ENDED_BADLY = frozenset({"FAILED", "CANCELLED", "UNKNOWN"})


class ExperimentFailed(MillraceError):
    """A task of an experiment did not succeed."""


@contextmanager
def experiment(
    recipe: Recipe,
    executor: run.Executor | str,
    *,
    cluster: str | None = None,
    chain: bool = False,
    options: Options | None = None,
    dry_run: bool = False,
) -> Iterator[run.Experiment]:
    """The experiment of a recipe, with its tasks added and nothing run yet.

    executor: `slurm` or `local`, made from the cluster file; or one of NeMo-Run's, of which account, partition, time,
    tunnel and the like stay and nodes, signal and commands are set. cluster: name or file, needed for Slurm. chain: a
    task for each stage, each behind the one before it.

    The run's folder is made ready as by `millrace run`, unless dry_run says that nothing will be run. Raises
    ConfigError with every problem, and at the end of the block ExperimentFailed, naming them, when tasks that ran in it
    did not succeed.
    """
    options = options or Options()
    require_runnable(recipe)
    launch = prepare(recipe, cluster) if cluster else None
    for line in launch.warnings if launch else ():
        sys.stderr.write(f"warning: {line}\n")
    base = _executor(executor, launch)
    if isinstance(base, run.SlurmExecutor) and any(map(str.isspace, get_nemorun_home())):
        raise ConfigError(
            f"NEMORUN_HOME is {get_nemorun_home()!r}, and NeMo-Run submits no script from a path with spaces; set "
            "it to another folder on a disk that the nodes share"
        )
    for line in (
        foresee(recipe, Path(recipe.run_dir), options) if dry_run else _made_ready(recipe, base, launch, options)
    ):
        sys.stderr.write(f"{line}\n")
    try:
        with run.Experiment(recipe.name) as built:  # which waits for its tasks as the block ends
            _add_tasks(built, recipe, base, launch, jobs(recipe, chain, options.until))
            yield built
    except UnexpectedExit as error:
        said = "; ".join(line for line in error.result.stderr.splitlines() if line.strip())
        raise ExperimentFailed(f"{error.result.command.split()[0]} refused a task of {built._id}: {said}") from error
    _require_success(built)


def _made_ready(recipe: Recipe, executor: run.Executor, launch: Launch | None, options: Options) -> list[str]:
    """Make the folder of the run ready; what a person should be told. Raises ConfigError when a job of the run is in
    the queue or runs."""
    run_dir, on_slurm = Path(recipe.run_dir), isinstance(executor, run.SlurmExecutor)
    if on_slurm:
        require_free(run_dir)
    with locked(run_dir):
        told = start(recipe, run_dir, options)
    if on_slurm:
        assert launch is not None
        write_for_nodes(launch)
    return told


def _add_tasks(
    built: run.Experiment,
    recipe: Recipe,
    executor: run.Executor,
    launch: Launch | None,
    tasks: Mapping[str, str | None],
) -> None:
    """Add a task for each entry, its name and the last stage it runs, behind the one before it."""
    before: list[str] = []
    for name, last in tasks.items():
        task = run.Script(inline=_command(recipe, executor, launch, last))
        before = [built.add(task, executor=executor.clone(), name=name.replace("_", "-"), dependencies=before)]


def _require_success(built: run.Experiment) -> None:
    """Raises ExperimentFailed for tasks that ended otherwise, which NeMo-Run itself passes over. One that was not run,
    or goes on by itself, has not ended."""
    states = {job.id: str(getattr(job.state, "name", job.state)) for job in built.jobs}
    failed = [f"{name} is {state}" for name, state in states.items() if state in ENDED_BADLY]
    if failed:
        raise ExperimentFailed(f"of the experiment {built._id}, {', '.join(failed)}; its files are in {built._exp_dir}")


def _executor(executor: run.Executor | str, launch: Launch | None) -> run.Executor:
    if executor == "local":
        return run.LocalExecutor()
    if executor == "slurm" or isinstance(executor, run.SlurmExecutor):
        if launch is None:
            raise ConfigError(
                "an executor for Slurm needs a cluster: --cluster NAME of slurm/clusters/, or a YAML file"
            )
        own = slurm_executor(launch.cluster) if isinstance(executor, str) else executor.clone()
        return _fitted(own, launch)
    if isinstance(executor, str):
        raise ConfigError(f"there is no executor {executor}; name slurm or local, or give one of NeMo-Run's own")
    if launch is not None and launch.placement.nodes > 1:
        raise ConfigError(
            f"the run wants {launch.placement.nodes} nodes, which {type(executor).__name__} does not get here; use a "
            "SlurmExecutor, or lower parallel and fleet.engines until one node holds them"
        )
    return executor.clone()


def slurm_executor(cluster: ClusterConfig) -> run.SlurmExecutor:
    """An executor with what a cluster file says of accounts, queues and containers. Raises ConfigError without an
    account, which NeMo-Run needs."""
    slurm = cluster.slurm
    if slurm.account is None:
        raise ConfigError(f"NeMo-Run names its jobs by their account: set slurm.account in the file of {cluster.name}")
    return run.SlurmExecutor(
        account=slurm.account,
        partition=slurm.partition,
        qos=slurm.qos,
        time=slurm.time_limit,
        exclusive=True if slurm.exclusive else None,
        mem="0" if slurm.exclusive else None,
        cpus_per_task=None if slurm.exclusive else cluster.node.cores,
        container_image=cluster.container.image if cluster.container else None,
        retries=RETRIES,
        tunnel=LocalTunnel(job_dir=""),
        packager=run.Packager(),
    )


def _fitted(executor: run.SlurmExecutor, launch: Launch) -> run.SlurmExecutor:
    """The executor with the nodes of the run and the signal that makes it save itself."""
    if not isinstance(executor.tunnel, LocalTunnel):
        raise ConfigError(
            f"the run's folder {launch.run_dir} must be on a disk that the nodes share, which a tunnel does not "
            "promise; launch from a node of the cluster, with a LocalTunnel"
        )
    node, slurm = launch.cluster.node, launch.cluster.slurm
    executor.nodes, executor.ntasks_per_node = launch.placement.nodes, 1
    executor.signal = f"USR1@{slurm.warn_s}"
    executor.srun_args = [*(executor.srun_args or []), "--cpu-bind=none"]
    if node.gpus and slurm.request == "gpus-per-node":
        executor.gpus_per_node = node.gpus
    elif node.gpus and slurm.request == "gres":
        executor.gres = f"gpu:{node.gpus}"
    more = {key: value for key, value in map(_parameter, slurm.options)}
    executor.additional_parameters = {"kill_on_invalid_dep": "yes", **more, **(executor.additional_parameters or {})}
    if launch.cluster.container:
        executor.container_mounts = [*executor.container_mounts, *mounts(launch)]
    if launch.env_file:
        executor.setup_lines = f"source {shlex.quote(str(launch.env_file))}\n{executor.setup_lines or ''}"
    return executor


def _parameter(option: str) -> tuple[str, Any]:
    """An option of sbatch as NeMo-Run takes it: --constraint=ib is constraint: ib, one without a value is true."""
    name, _, value = option.lstrip("-").partition("=")
    return name.replace("-", "_"), value or True


def _command(recipe: Recipe, executor: run.Executor, launch: Launch | None, last: str | None) -> str:
    if isinstance(executor, run.SlurmExecutor):
        assert launch is not None
        return node_command(launch, last)
    python = launch.python if launch else sys.executable
    command = [python, "-m", "millrace.cli", "run", str(Path(recipe.run_dir) / RECIPE)]
    return shlex.join([*command, *(["--until", last] if last else [])])
