import json
from pathlib import Path

import pytest

from millrace.config.errors import ConfigError
from millrace.config.loading import load_recipe
from millrace.launch.run_dir import explain, locked, record, recorded_recipe, versions


def prepare(recipe, run_dir, accept_changes, **stages):
    changes = explain(recipe, run_dir, accept_changes, **stages)
    record(recipe, run_dir)
    return changes


def test_the_folder_tells_the_recipe_and_the_versions(recipe_file: Path, tmp_path: Path) -> None:
    recipe, run_dir = load_recipe(recipe_file), tmp_path / "run"
    assert recorded_recipe(run_dir) is None
    assert prepare(recipe, run_dir, accept_changes=False) == []
    assert recorded_recipe(run_dir) == recipe
    told = json.loads((run_dir / "versions.json").read_text())
    assert told == versions() and {"python", "torch", "megatron-core"} <= told.keys()
    assert prepare(recipe, run_dir, accept_changes=False) == []


def test_changes_of_what_is_done_are_explained_and_taken_only_when_accepted(recipe_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    prepare(load_recipe(recipe_file), run_dir, accept_changes=False)
    changed = load_recipe(recipe_file, ["parallel.dp=2", "trainer.threads_per_rank=3"])
    with pytest.raises(ConfigError) as refused:
        prepare(changed, run_dir, accept_changes=False, begun=["warm"])
    first, *lines, last = str(refused.value).splitlines()
    assert first == f"{run_dir} holds a run of another recipe:"
    assert [line.split()[0] for line in lines] == ["parallel.dp", "trainer.threads_per_rank"]
    assert last.startswith("1 of these changes touches what is done. Take them back, set another run_dir, or")
    assert load_recipe(run_dir / "recipe.yaml").parallel.dp == 1
    changes = prepare(changed, run_dir, accept_changes=True, begun=["warm"])
    assert [change.effect for change in changes] == ["past", "free"]
    assert load_recipe(run_dir / "recipe.yaml") == changed


def test_changes_of_what_has_not_begun_are_taken_unasked(recipe_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    prepare(load_recipe(recipe_file), run_dir, accept_changes=False)
    changed = load_recipe(recipe_file, ["stages.climb.steps=6"])
    changes = prepare(changed, run_dir, accept_changes=False, begun=["start", "warm"], finished=["warm"])
    assert [(change.key, change.effect) for change in changes] == [("stages.climb.steps", "future")]
    assert load_recipe(run_dir / "recipe.yaml") == changed


def test_the_lock_is_free_again_after_the_run(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            locked(tmp_path),
            pytest.raises(ConfigError, match="is in use by the run with process id"),
            locked(tmp_path),
        ):
            pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"run_dir: .*file/run cannot be written \(Not a directory\); name another"),
        locked(tmp_path / "file" / "run"),
    ):
        pass
