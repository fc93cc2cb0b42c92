import json
from pathlib import Path

import pytest

from millrace.config.errors import ConfigError
from millrace.config.loading import load_recipe
from millrace.launch.run_dir import locked, prepare, versions


def test_the_folder_tells_the_recipe_and_the_versions(recipe_file: Path, tmp_path: Path) -> None:
    recipe, run_dir = load_recipe(recipe_file), tmp_path / "run"
    assert prepare(recipe, run_dir, accept_changes=False) is False
    assert load_recipe(run_dir / "recipe.yaml") == recipe
    told = json.loads((run_dir / "versions.json").read_text())
    assert told == versions() and {"python", "torch", "megatron-core"} <= told.keys()
    assert prepare(recipe, run_dir, accept_changes=False) is True


def test_changes_are_named_and_taken_only_when_accepted(recipe_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    prepare(load_recipe(recipe_file), run_dir, accept_changes=False)
    changed = load_recipe(recipe_file, ["parallel.dp=2", "trainer.threads_per_rank=3"])
    with pytest.raises(ConfigError, match=r"differs in parallel\.dp; set another run_dir"):
        prepare(changed, run_dir, accept_changes=False)
    assert load_recipe(run_dir / "recipe.yaml").parallel.dp == 1
    assert prepare(changed, run_dir, accept_changes=True) is True
    assert load_recipe(run_dir / "recipe.yaml") == changed


def test_the_lock_is_free_again_after_the_run(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            locked(tmp_path),
            pytest.raises(ConfigError, match="is in use by the run with process id"),
            locked(tmp_path),
        ):
            pass
