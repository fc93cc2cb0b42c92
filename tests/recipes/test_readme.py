import re
from pathlib import Path

import pytest

from millrace.config.loading import load_recipe
from millrace.config.rules import check_recipe

ROOT = Path(__file__).resolve().parents[2]


def test_the_recipe_of_the_readme_lacks_nothing_but_its_files(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block)
    problems = check_recipe(load_recipe(recipe))
    assert all("does not exist" in problem for problem in problems), problems


@pytest.mark.parametrize("name", ["dense", "moe", "cascade"])
def test_the_laptop_recipes_load(name):
    recipe = load_recipe(ROOT / "recipes" / "laptop" / f"{name}.yaml")
    assert recipe.model.dtype == recipe.fleet.dtype == "float32"
