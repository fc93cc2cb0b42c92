from __future__ import annotations

from collections.abc import Iterator

import pytest
from real_runs import RL, finish, output, start, wait_until, write_recipe, write_world

from millrace.rollout.auth import TOKEN_VARIABLE


@pytest.fixture(scope="session")
def standing_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """An engine of `millrace serve` that stays up for all runs that are not about engines; how their `fleet` names it.

    Every run pushes its own weights before it samples, and a run that is killed leaves it to the next one.
    """
    recipe = write_recipe(write_world(tmp_path_factory.mktemp("engine")), "engine", stages=[RL], domains=True)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(TOKEN_VARIABLE, "the tests' own")
        process = start(recipe, "fleet.max_model_len=2048", command=("serve",))
        try:
            assert wait_until(lambda: "fleet.addresses=" in output(recipe), process, recipe), output(recipe)
            address = output(recipe).split("fleet.addresses=[")[1].split("]")[0]
            yield {"engines": 0, "addresses": [address]}
        finally:
            process.terminate()
            assert finish(process, recipe) == 0, output(recipe)
