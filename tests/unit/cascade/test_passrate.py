import dataclasses
import json
from pathlib import Path

import pytest

from millrace.cascade.passrate import measuring_recipe, of_environment
from millrace.config.errors import ConfigError
from millrace.config.loading import load_recipe
from millrace.config.schema import DomainConfig


def test_a_recipe_that_waits_for_the_pass_rates_can_be_measured_by(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["domains.math.pass_rates=later.jsonl", "stages.climb.curriculum.above=0"])
    measuring = measuring_recipe(recipe, "math", None)
    assert list(measuring.domains) == ["math"] and measuring.model == recipe.model
    assert measuring.parallel.world_size == 1


def test_another_model_is_taken_and_checked(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert measuring_recipe(recipe, "math", Path("moe")).model.path == str(recipe_file.parent / "moe")
    with pytest.raises(ConfigError, match=r"the folder .*/gone does not exist"):
        measuring_recipe(recipe, "math", Path("gone"))


def test_what_cannot_be_measured_is_refused_with_the_reason(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    with pytest.raises(ConfigError, match=r"domains\.maths is not in the recipe \(did you mean math\?\)"):
        measuring_recipe(recipe, "maths", None)
    fleet = dataclasses.replace(recipe.fleet, engines=0, addresses=("http://127.0.0.1:1",))
    with pytest.raises(ConfigError, match="weights that nobody here knows"):
        measuring_recipe(dataclasses.replace(recipe, fleet=fleet), "math", None)
    judged = {"math": dataclasses.replace(recipe.domains["math"], environment="genrm")}
    with pytest.raises(ConfigError, match="a judge compares its answers"):
        measuring_recipe(dataclasses.replace(recipe, domains=judged), "math", None)


@pytest.mark.parametrize(
    ("environment", "key", "counts", "does_not"),
    [
        ("code", "sandbox", {"cpu_s": 9.0}, {"workers": 3}),
        ("python_tool", "python", {"calls": 3}, {}),
        ("python_tool", "sandbox", {"memory_mb": 64}, {"tier": "landlock"}),
        ("swe_agentic", "swe", {"command_s": 3.0}, {"at_once": 9}),
        ("swe_agentic", "turns", {"most": 3}, {}),
        ("agent", "agent", {"url": "http://other:1"}, {"concurrency": 9}),
    ],
)
def test_what_pass_rates_depend_on_is_what_their_environment_reads(
    environment: str, key: str, counts: dict, does_not: dict
) -> None:
    def settings(**changes: object) -> dict:
        domain = DomainConfig(environment=environment, train="a", held_out="b")  # type: ignore[arg-type]
        section = dataclasses.replace(getattr(domain, key), **changes)
        return of_environment(dataclasses.replace(domain, **{key: section}))

    assert settings() == settings(**does_not) != settings(**counts)
    assert json.loads(json.dumps(settings())) == settings()
