"""A run as a Slurm job: its script, what is checked before it is submitted, and submitting it.

The script holds no logic: it asks for nodes, reads the site's env.sh and starts `millrace.launch.node` once on each. A
job that was stopped by Slurm's warning or for another job saves itself, ends with 75 and is put into the queue again.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.config.cluster import ClusterConfig
from millrace.config.errors import ConfigError
from millrace.config.loading import load_cluster
from millrace.config.placement import Placement, write_placement
from millrace.config.schema import BUILT_IN_TEMPLATES, Recipe, SftStage
from millrace.launch.job import JobRecord, Site, read_job, write_job, write_site
from millrace.launch.node import CONTINUE
from millrace.launch.queue import SlurmError, slurm, states
from millrace.planning.cluster_plan import plan_on_cluster
from millrace.planning.clusters import find_cluster
from millrace.rollout.rendezvous import LAUNCH_FOLDER, NETWORK, PLACEMENT, write_json

ENV_FILE = "env.sh"

SCRIPT = """\
#!/bin/bash
{options}

{environment}
set -euo pipefail
code=0
{srun} || code=$?
# {again}: saved for the warning or for another job; it goes on where it stood.
if [ "$code" -eq {again} ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Everything that a job script is made from."""

    recipe: Recipe
    cluster: ClusterConfig
    file: Path
    """The cluster file."""
    placement: Placement
    warnings: tuple[str, ...] = ()
    """What the plan says will not fit the nodes' memory."""

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir)

    @property
    def log(self) -> Path:
        return self.run_dir / "logs" / "job-%j.log"

    @property
    def python(self) -> str:
        return self.cluster.python or ("python3" if self.cluster.container else sys.executable)

    @property
    def env_file(self) -> Path | None:
        """The site's env.sh: beside the cluster file, or in the folder above."""
        found = [folder / ENV_FILE for folder in self.file.parents[:2] if (folder / ENV_FILE).exists()]
        return found[0] if found else None


def prepare(recipe: Recipe, cluster: str) -> Launch:
    """A launch of a recipe on a cluster, given by name or by file. Raises ConfigError with every problem."""
    file = find_cluster(cluster).resolve()
    config = load_cluster(file)
    plan = plan_on_cluster(recipe, config)
    unfit = tuple(str(one) for one in plan.unfit)
    launch = Launch(recipe=recipe, cluster=config, file=file, placement=plan.placement, warnings=unfit)
    problems = list(_problems(launch))
    if problems:
        raise ConfigError(problems)
    return launch


def job_script(launch: Launch, until: str | None = None) -> str:
    """The script of the job that runs a recipe, up to a stage."""
    env = launch.env_file
    return SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in _options(launch, until)),
        environment=f"source {shlex.quote(str(env))}" if env else "# the cluster file has no env.sh beside it",
        srun=" \\\n  ".join(_srun(launch, until)),
        again=CONTINUE,
    )


def scripts(launch: Launch, chain: bool, until: str | None) -> dict[str, str]:
    """The scripts by name: one of the whole run, or with `chain` one for each stage."""
    return {name: job_script(launch, last) for name, last in jobs(launch.recipe, chain, until).items()}


def jobs(recipe: Recipe, chain: bool, until: str | None) -> dict[str, str | None]:
    """The jobs of a run by name, with the last stage of each."""
    if not chain:
        return {"job": until}
    names = [stage.name for stage in recipe.stages]
    wanted = names[: names.index(until) + 1] if until else names
    # The last stage of a recipe is run without a word on where to stop, so that its job exports.
    return {f"job-{name}": None if name == names[-1] else name for name in wanted}


def require_slurm() -> None:
    """Raises SlurmError where no job can be submitted: without Slurm, and where its controller does not answer."""
    slurm("sbatch", "--version")
    asked = slurm("sinfo", "--noheader")
    if asked.returncode != 0:
        said = asked.stderr.strip().splitlines() or ["it says nothing"]
        raise SlurmError(f"Slurm does not answer here ({said[-1]}); launch from a machine of its cluster")


def require_free(run_dir: Path) -> None:
    """Raises ConfigError when a job of the run is in the queue or runs."""
    record = read_job(run_dir / LAUNCH_FOLDER)
    alive = [state for state in states(record.ids) if state.alive] if record else []
    if alive:
        raise ConfigError(
            f"{run_dir} is in use by Slurm job {alive[0].id} ({alive[0].state.lower()}); cancel it by "
            f"`millrace cancel {shlex.quote(str(run_dir))}` or set another run_dir"
        )


def write_for_nodes(launch: Launch) -> Path:
    """Write what every node of a job reads into the run's folder for launches; that folder."""
    folder = launch.run_dir / LAUNCH_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    launch.log.parent.mkdir(exist_ok=True)
    write_placement(folder / PLACEMENT, launch.placement)
    cluster = launch.cluster
    site = Site(cluster=cluster.name, interface=cluster.network.interface, environment=cluster.environment)
    write_site(folder, site)
    write_json(folder / NETWORK, dataclasses.asdict(cluster.network))
    return folder


def submit(launch: Launch, written: dict[str, str]) -> JobRecord:
    """Write what the nodes read, and submit the scripts, each behind the one before it.

    Raises SlurmError with what Slurm says of the first it refuses; those before it are cancelled.
    """
    folder = write_for_nodes(launch)
    ids: list[str] = []
    for name, text in written.items():
        script = folder / f"{name}.sbatch"
        script.write_text(text, encoding="utf-8")
        behind = [f"--dependency=afterok:{ids[-1]}", "--kill-on-invalid-dep=yes"] if ids else []
        asked = slurm("sbatch", "--parsable", *behind, str(script))
        if asked.returncode != 0:
            if ids:
                slurm("scancel", *ids)
            raise SlurmError(_refusal(asked.stderr, launch))
        ids.append(asked.stdout.strip().split(";")[0])
    record = JobRecord(ids=tuple(ids), log=str(launch.log))
    write_job(folder, record)
    return record


# ---- rendering


def _options(launch: Launch, until: str | None) -> Iterator[str]:
    slurm, node = launch.cluster.slurm, launch.cluster.node
    name = launch.recipe.name if until is None else f"{launch.recipe.name}-{until}"
    yield _quoted("--job-name", name)
    yield f"--nodes={launch.placement.nodes}"
    yield "--ntasks-per-node=1"
    yield "--exclusive" if slurm.exclusive else f"--cpus-per-task={node.cores}"
    if slurm.exclusive:
        yield "--mem=0"
    if node.gpus and slurm.request != "none":
        yield f"--gpus-per-node={node.gpus}" if slurm.request == "gpus-per-node" else f"--gres=gpu:{node.gpus}"
    for key in ("account", "partition", "qos"):
        if value := getattr(slurm, key):
            yield _quoted(f"--{key}", value)
    yield f"--time={slurm.time_limit}"
    yield f"--signal=USR1@{slurm.warn_s}"
    yield "--requeue"
    yield "--open-mode=append"
    # Slurm replaces what follows a % sign.
    log = str(launch.log)
    yield _quoted("--output", log.removesuffix("%j.log").replace("%", "%%") + "%j.log")
    yield _quoted("--chdir", str(launch.run_dir))
    yield from slurm.options


def _srun(launch: Launch, until: str | None) -> Iterator[str]:
    yield "srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none"
    container = launch.cluster.container
    if container:
        mounted = shlex.quote(",".join(mounts(launch)))
        yield f"--container-image={shlex.quote(container.image)} --container-mounts={mounted}"
    yield node_command(launch, until)


def node_command(launch: Launch, until: str | None) -> str:
    """What every node of a job runs."""
    command = [launch.python, "-m", "millrace.launch.node", str(launch.run_dir), *([until] if until else [])]
    return shlex.join(command)


def _quoted(option: str, value: str) -> str:
    """An option in an #SBATCH line, where sbatch takes double quotes and backslashes as a shell does."""
    if re.fullmatch(r"[\w./%+@:-]+", value):
        return f"{option}={value}"
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'{option}="{escaped}"'


def mounts(launch: Launch) -> list[str]:
    """What the container sees of the host: the cluster file's folders, and those of the recipe they do not hold."""
    container = launch.cluster.container
    assert container is not None
    found = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    inside = [Path(mount.split(":")[1]) for mount in found]
    for folder in sorted({str(path) for path in recipe_folders(launch.recipe)}):
        if not any(Path(folder).is_relative_to(known) for known in inside):
            found.append(f"{folder}:{folder}")
            inside.append(Path(folder))
    return found


def recipe_folders(recipe: Recipe) -> Iterator[Path]:
    """The folders that a run reads and writes."""
    yield Path(recipe.run_dir)
    yield Path(recipe.model.path)
    if recipe.model.lora and recipe.model.lora.adapter:
        yield Path(recipe.model.lora.adapter)
    template = recipe.model.chat_template
    if template and template not in BUILT_IN_TEMPLATES:
        yield Path(template).parent
    for domain in recipe.domains.values():
        yield from (Path(file).parent for file in (domain.train, domain.held_out, domain.pass_rates) if file)
    yield from (Path(judge.model) for judge in recipe.judges_used.values() if judge.model)
    for stage in recipe.stages:
        if isinstance(stage, SftStage):
            yield from (Path(file).parent for file in stage.data)


# ---- what is refused


def _problems(launch: Launch) -> Iterator[str]:
    container = launch.cluster.container
    if container is None:
        python = launch.cluster.python
        if python and not Path(python).exists():
            yield f"{launch.file}: python: {python} does not exist here; name one on a disk that all nodes share"
        return
    if container.image.startswith(("/", "./", "~")) and not Path(container.image).expanduser().exists():
        yield f"{launch.file}: container.image: the file {container.image} does not exist; import it with enroot first"
    for mount in mounts(launch):
        if "," in mount or mount.count(":") > 2:
            yield f"{mount!r} cannot be mounted into a container: pyxis parts mounts at commas and colons; rename it"


def _refusal(stderr: str, launch: Launch) -> str:
    """What sbatch says, with the settings it speaks of."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in stderr.splitlines() if line.strip()]
    said = "; ".join(dict.fromkeys(lines)) or "nothing"
    slurm = launch.cluster.slurm
    named = {"account": slurm.account, "partition": slurm.partition, "qos": slurm.qos}
    settings = ", ".join(f"{key} {value or 'default'}" for key, value in named.items())
    return f"Slurm refused the job ({settings}, {launch.placement.nodes} nodes): {said}; correct slurm in {launch.file}"


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs. Raises SlurmError."""
    asked = slurm("scancel", *ids)
    if asked.returncode != 0:
        raise SlurmError(f"scancel {' '.join(ids)}: {asked.stderr.strip()}")
