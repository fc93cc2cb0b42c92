import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from millrace.cascade.ledger import Ledger
from millrace.config.loading import dump_recipe, load_recipe
from millrace.launch.run_dir import locked


def millrace(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "millrace.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["check", "recipe.yaml"],
        ["plan", "recipe.yaml"],
        ["plan", "recipe.yaml", "--cluster", "dgx-h100", "--suggest", "--scale", "--page", "plan.html"],
        ["check", "--schema"],
    ],
)
def test_help_check_and_plan_import_nothing_heavy(recipe_file: Path, arguments: list[str]) -> None:
    program = f"""
import sys, millrace.cli
sys.argv = ["millrace", *{arguments!r}]
try:
    millrace.cli.main()
except SystemExit as ending:
    assert not ending.code, ending.code
heavy = {{"torch", "megatron", "transformers", "vllm", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=recipe_file.parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_sound_recipe_is_said_to_be_fine(recipe_file: Path) -> None:
    done = millrace("check", "recipe.yaml", cwd=recipe_file.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "recipe.yaml: fine. 1 trainer rank, stages: warm, climb\n"


def test_names_are_printed_as_they_are(recipe_file: Path) -> None:
    recipe_file.rename(recipe_file.with_name("at:100:[red].yaml"))
    done = millrace("check", "at:100:[red].yaml", cwd=recipe_file.parent)
    assert done.stdout == "at:100:[red].yaml: fine. 1 trainer rank, stages: warm, climb\n", done.stderr


def test_every_problem_is_a_line_of_stderr_and_the_exit_code_is_two(recipe_file: Path) -> None:
    done = millrace("check", "recipe.yaml", "parallel.tp=3", "parallel.pp=5", cwd=recipe_file.parent)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 4 and lines[-1] == "3 problems"
    assert "Traceback" not in done.stderr


def test_a_misspelt_key_is_answered_with_its_line_and_the_nearest_name(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("steps: 5", "stpes: 5"))
    done = millrace("check", "recipe.yaml", cwd=recipe_file.parent)
    assert done.returncode == 2
    assert "recipe.yaml:11: stages.climb.stpes is not a known key; did you mean steps?" in done.stderr


def test_the_traceback_is_shown_on_request_only(recipe_file: Path) -> None:
    assert "Traceback" not in millrace("check", "nowhere.yaml", cwd=recipe_file.parent).stderr
    assert "Traceback" in millrace("--traceback", "check", "nowhere.yaml", cwd=recipe_file.parent).stderr


def test_a_key_is_explained_on_the_command_line(recipe_file: Path) -> None:
    done = millrace("check", "--explain", "trainer.recompute", cwd=recipe_file.parent)
    assert done.returncode == 0 and "Activation recomputation" in done.stdout
    assert millrace("check", "--explain", "trainer.recompte", cwd=recipe_file.parent).returncode == 2


def test_a_plan_can_be_read_by_programs(recipe_file: Path) -> None:
    done = millrace("plan", "recipe.yaml", "parallel.dp=2", "--json", cwd=recipe_file.parent)
    assert done.returncode == 0
    assert json.loads(done.stdout)["world_size"] == 2


def test_a_plan_for_a_cluster_can_be_read_by_programs(recipe_file: Path) -> None:
    done = millrace("plan", "recipe.yaml", "--cluster", "cpu", "fleet.transport=disk", "--json", cwd=recipe_file.parent)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] and plan["cluster"] == "cpu"
    assert {role["name"] for role in plan["memory"]["roles"]} == {"trainer", "engine"}


def test_a_plan_that_does_not_fit_ends_with_one_and_says_what_helps(recipe_file: Path) -> None:
    asked = ["plan", "recipe.yaml", "--cluster", "cpu", "fleet.transport=disk", "fleet.kv_cache_bytes=68719476736"]
    done = millrace(*asked, cwd=recipe_file.parent)
    assert done.returncode == 1
    assert "What helps most: fleet.kv_cache_bytes=34359738368 (32.0 GiB less)" in done.stdout


def test_what_plans_for_a_cluster_asks_for_its_name(recipe_file: Path) -> None:
    done = millrace("plan", "recipe.yaml", "--suggest", cwd=recipe_file.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "--suggest, --scale, --measured and --page plan for a cluster; add --cluster NAME_OR_FILE\n"
    done = millrace("plan", "recipe.yaml", "--cluster", "nowhere", cwd=recipe_file.parent)
    assert "no cluster file or name is 'nowhere'; there are cpu, dgx-h100, hgx-h200" in done.stderr


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    assert millrace("--version", cwd=tmp_path).stdout == f"millrace {metadata.version('millrace')}\n"


def test_check_for_a_cluster_says_what_its_gpus_cannot_do(recipe_file: Path) -> None:
    asked = ("check", "recipe.yaml", "trainer.device=cuda", "parallel.dp=8", "fleet.transport=nccl")
    for fp8, code in (("blockwise", 0), ("mxfp8", 2)):
        done = millrace(*asked, f"precision.fp8={fp8}", "--cluster", "dgx-h100", cwd=recipe_file.parent)
        assert done.returncode == code, done.stdout + done.stderr
    assert "the GPU is dgx-h100's h100 (Hopper, compute capability 9.0); use blockwise" in done.stderr.replace(
        "\n", " "
    )


@pytest.mark.parametrize("command", ["check", "plan", "run", "serve", "convert", "verify", "data", "doctor"])
def test_the_help_of_every_command_holds_an_example(tmp_path: Path, command: str) -> None:
    nested = {"convert": ["hf-to-megatron"], "verify": ["logits"], "data": ["passrate"]}.get(command, [])
    assert f"millrace {command}" in millrace(command, *nested, "--help", cwd=tmp_path).stdout


def test_the_help_of_data_names_what_it_can_do(tmp_path: Path) -> None:
    told = millrace("data", "--help", cwd=tmp_path).stdout
    assert all(f" {name} " in told for name in ("show", "passrate", "tools", "long-context"))
    assert "millrace data show recipes/laptop/tools.yaml" in millrace("data", "show", "--help", cwd=tmp_path).stdout


def test_a_run_of_another_recipe_is_not_continued_unasked(recipe_file: Path) -> None:
    run_dir = recipe_file.parent / "run"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe_file)))
    ledger = Ledger(run_dir)
    ledger.append("stage_started", stage="warm")
    ledger.append("stage_finished", stage="warm")
    done = millrace("run", "recipe.yaml", "stages.warm.steps=6", "stages.climb.steps=6", cwd=recipe_file.parent)
    assert done.returncode == 2
    assert "stages.warm.steps   10 -> 6  past    stage warm is finished and will not run again" in done.stderr
    assert "stages.climb.steps  5 -> 6   future  stage climb has not begun" in done.stderr


def test_two_runs_in_one_folder_are_refused(recipe_file: Path) -> None:
    with locked(recipe_file.parent / "run"):
        done = millrace("run", "recipe.yaml", cwd=recipe_file.parent)
    assert done.returncode == 2
    assert f"is in use by the run with process id {os.getpid()}" in done.stderr


def test_servers_are_not_started_without_a_secret_that_runs_know_too(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MILLRACE_FLEET_TOKEN", raising=False)
    done = millrace("serve", "recipe.yaml", cwd=recipe_file.parent)
    assert done.returncode == 1 and done.stderr.startswith("the environment variable MILLRACE_FLEET_TOKEN is not set")
    done = millrace("serve", "recipe.yaml", "fleet.engines=0", "fleet.addresses=[http://a:1]", cwd=recipe_file.parent)
    assert done.returncode == 2 and "say how many servers are to be started" in done.stderr


def test_a_failed_conversion_says_in_a_sentence_what_is_missing(recipe_file: Path) -> None:
    done = millrace("convert", "hf-to-megatron", "--hf", "nowhere", "--out", "out", cwd=recipe_file.parent)
    assert done.returncode != 0
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr
    assert not (recipe_file.parent / "out").exists()


def test_a_failed_verification_names_the_rank_and_its_log(recipe_file: Path) -> None:
    done = millrace("verify", "roundtrip", "--hf", "nowhere", cwd=recipe_file.parent)
    assert done.returncode != 0
    assert "nowhere" in done.stderr and "rank-0.log" in done.stderr
