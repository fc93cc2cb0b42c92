"""Job scripts, and what is refused before one is submitted."""

import dataclasses
import shlex
import subprocess
from pathlib import Path

import pytest

from millrace.config.cluster import ContainerConfig
from millrace.config.errors import ConfigError
from millrace.config.loading import load_recipe
from millrace.launch.queue import SlurmError
from millrace.launch.slurm import Launch, job_script, prepare, require_slurm, scripts

SITE = """\
name: site
nodes: 4
node: {gpus: 8, cores: 32, memory_gib: 500}
slurm: {account: lab, partition: batch, qos: high, time_limit: "1-02:00:00", warn_s: 120, options: [--constraint=ib]}
"""


@pytest.fixture
def site(recipe_file: Path) -> Path:
    file = recipe_file.parent / "site.yaml"
    file.write_text(SITE)
    return file


def launch_of(recipe_file: Path, site: Path, *overrides: str) -> Launch:
    return prepare(load_recipe(recipe_file, ["fleet.transport=disk", *overrides]), str(site))


def sbatch_lines(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_script_asks_for_what_the_cluster_file_says(recipe_file: Path, site: Path) -> None:
    launch = launch_of(recipe_file, site, "parallel.dp=16")
    run_dir = recipe_file.parent / "run"
    assert sbatch_lines(job_script(launch)) == [
        "--job-name=small",
        "--nodes=3",
        "--ntasks-per-node=1",
        "--exclusive",
        "--mem=0",
        "--gpus-per-node=8",
        "--account=lab",
        "--partition=batch",
        "--qos=high",
        "--time=1-02:00:00",
        "--signal=USR1@120",
        "--requeue",
        "--open-mode=append",
        f"--output={run_dir}/logs/job-%j.log",
        f"--chdir={run_dir}",
        "--constraint=ib",
    ]


def test_the_script_is_a_sound_one_whatever_the_folders_are_called(recipe_file: Path, site: Path) -> None:
    folder = recipe_file.parent / 'a "run", $HOME and 50% more'
    launch = launch_of(recipe_file, site, f"run_dir='{folder}'")
    script = job_script(launch, until="warm")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    srun = script[script.index("srun ") : script.index("|| code")].replace("\\\n", " ")
    assert shlex.split(srun)[-4:] == ["-m", "millrace.launch.node", str(folder), "warm"]
    escaped = str(folder).replace('"', r"\"")
    assert f'--chdir="{escaped}"' in sbatch_lines(script)
    assert f'--output="{escaped.replace("%", "%%")}/logs/job-%j.log"' in sbatch_lines(script)


def test_env_sh_is_read_from_beside_the_cluster_file_or_from_above(recipe_file: Path, site: Path) -> None:
    assert "source" not in job_script(launch_of(recipe_file, site))
    (site.parent / "env.sh").write_text("")
    (site.parent / "clusters").mkdir()
    below = site.parent / "clusters" / "site.yaml"
    below.write_text(SITE)
    for file in (site, below):
        assert f"source {site.parent}/env.sh" in job_script(launch_of(recipe_file, file)).splitlines()


def test_a_container_sees_every_folder_of_the_recipe_once(recipe_file: Path, site: Path) -> None:
    image = recipe_file.parent / "image.sqsh"
    image.touch()
    site.write_text(SITE + f"container: {{image: {image}, mounts: [/scratch, /a:/b]}}\n")
    folder = recipe_file.parent
    script = job_script(launch_of(recipe_file, site))
    # base/ and run/ lie in the folder of the data.
    assert f"--container-image={image} --container-mounts=/scratch:/scratch,/a:/b,{folder}:{folder} " in script
    assert "python3 -m millrace.launch.node" in script


def test_an_image_that_is_not_there_is_refused(recipe_file: Path, site: Path) -> None:
    site.write_text(SITE + "container: {image: /nowhere/image.sqsh}\n")
    with pytest.raises(ConfigError, match=r"site.yaml: container.image: the file /nowhere/image.sqsh does not exist"):
        launch_of(recipe_file, site)


def test_a_chain_has_a_job_for_each_stage_and_the_last_one_exports(recipe_file: Path, site: Path) -> None:
    launch = launch_of(recipe_file, site)
    written = scripts(launch, chain=True, until=None)
    assert list(written) == ["job-warm", "job-climb"]
    assert written["job-warm"].count("run warm || code") == 1
    assert written["job-climb"] == job_script(launch)
    assert list(scripts(launch, chain=True, until="warm")) == ["job-warm"]


def test_gpus_are_asked_for_in_the_site_s_way(recipe_file: Path, site: Path) -> None:
    launch = launch_of(recipe_file, site)
    for request, expected in {"gres": ["--gres=gpu:8"], "none": []}.items():
        slurm = dataclasses.replace(launch.cluster.slurm, request=request)  # type: ignore[arg-type]
        other = dataclasses.replace(launch, cluster=dataclasses.replace(launch.cluster, slurm=slurm))
        assert [
            line for line in sbatch_lines(job_script(other)) if "gpu" in line.split("=")[0] or "gpu:" in line
        ] == expected


def test_a_container_s_image_may_be_a_registry_s(recipe_file: Path, site: Path) -> None:
    site.write_text(SITE + "container: {image: nvcr.io/nvidia/pytorch:25.04-py3}\n")
    launch = launch_of(recipe_file, site)
    assert launch.cluster.container == ContainerConfig(image="nvcr.io/nvidia/pytorch:25.04-py3")


def test_a_machine_without_slurm_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="sbatch is not on PATH: Slurm is not installed here"):
        require_slurm()


def test_what_will_not_fit_is_said_before_the_job_is_submitted(recipe_file: Path, site: Path) -> None:
    assert launch_of(recipe_file, site).warnings == ()
    site.write_text(SITE.replace("cores: 32,", "cores: 32, gpu_memory_gib: 1,"))
    trainer = next(line for line in launch_of(recipe_file, site, "trainer.device=cuda").warnings if "trainer" in line)
    assert "of each GPU, which has 1.0 GiB for it" in trainer
