from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from millrace.config.cluster import ClusterConfig, NodeConfig
from millrace.config.loading import load_recipe
from millrace.config.model_shape import ModelShape
from millrace.config.rules import layout_of_recipe, layout_problems
from millrace.planning.cluster_plan import plan_on_cluster
from millrace.planning.command import as_text, planned, to_json, write_page
from millrace.planning.scaling import scaled
from millrace.planning.suggest import layouts, suggest

SMALL = ClusterConfig(
    name="small", nodes=2, node=NodeConfig(gpus=8, gpu="h100", gpu_memory_gib=80, cores=64, memory_gib=1000)
)


@pytest.fixture
def cuda_recipe(recipe_file: Path) -> Path:
    text = recipe_file.read_text().replace("device: cpu", "device: cuda").replace("path: base", "path: moe")
    recipe_file.write_text(text.replace("fleet: {", "fleet: {transport: nccl, "))
    return recipe_file


def test_every_suggestion_can_be_pasted_and_fits(cuda_recipe: Path) -> None:
    recipe = load_recipe(cuda_recipe)
    found = suggest(recipe, SMALL, ModelShape.from_hf(recipe.model.path))
    assert found.tried and found.best
    assert [one.rank for one in found.best] == sorted(one.rank for one in found.best)
    for one in found.best:
        pasted = load_recipe(cuda_recipe, str(one).split())
        assert layout_of_recipe(pasted, ModelShape.from_hf(pasted.model.path)) == []
        plan = plan_on_cluster(pasted, SMALL)
        assert plan.fits
        assert max(r.device_bytes for r in plan.memory.roles if r.name.startswith("trainer")) == one.device_bytes


def test_no_suggestion_is_slower_than_the_recipe_as_it_is(cuda_recipe: Path) -> None:
    recipe = load_recipe(cuda_recipe)
    found = suggest(recipe, SMALL, ModelShape.from_hf(recipe.model.path))
    assert found.present is not None
    assert found.best[0].step_s <= found.present.step_s


def test_only_layouts_that_the_rules_allow_are_tried(cuda_recipe: Path) -> None:
    shape = ModelShape.from_hf(load_recipe(cuda_recipe).model.path)
    tried = list(layouts(8, shape, 8))
    assert len(tried) == len(set(tried)) > 5
    assert all(p.world_size == 8 and list(layout_problems(p, shape)) == [] for p in tried)
    assert {p.tp for p in tried} == {1, 2}, "the model has two key/value heads"
    assert {p.ep for p in tried} == {1, 2, 4}


def test_a_recipe_without_a_place_still_gets_suggestions(cuda_recipe: Path) -> None:
    recipe = load_recipe(cuda_recipe, ["parallel.dp=64"])
    made = planned(recipe, SMALL, suggest=True)
    assert made.plan is None and "the run wants" in made.no_place
    assert "as it is, the recipe has no place" in as_text(made)
    assert json.loads(to_json(made))["suggestions"]["best"]


def test_suggestions_leave_nodes_that_verify_theirs(cuda_recipe: Path) -> None:
    code = "domains.code={environment: code, train: math.jsonl, held_out: held-out.jsonl}"
    recipe = load_recipe(cuda_recipe, [code, "placement.verifier_nodes=1"])
    found = suggest(recipe, SMALL, ModelShape.from_hf(recipe.model.path))
    assert found.best
    for one in found.best:
        pasted = load_recipe(cuda_recipe, [code, "placement.verifier_nodes=1", *str(one).split()])
        assert plan_on_cluster(pasted, SMALL).placement.verifiers


def test_a_batch_that_stays_gains_less_and_less_from_more_gpus(cuda_recipe: Path) -> None:
    recipe = load_recipe(cuda_recipe, ["parallel.dp=4", "parallel.ep=4", "fleet.engines=4"])
    started = time.process_time()
    found = scaled(recipe, SMALL, ModelShape.from_hf(recipe.model.path))
    assert time.process_time() - started < 30
    assert [size.gpus for size in found.sizes] == [8, 32, 128, 512, 2048, 8192, 16384]
    assert all(size.trainer + size.engines == size.gpus for size in found.sizes)
    synchronous = [size.outcomes[0] for size in found.sizes]
    assert synchronous[0].step_s > synchronous[2].step_s
    assert synchronous[-1].fleet_idle > synchronous[0].fleet_idle
    assert synchronous[-1].tokens_s < 16384 / 8 * synchronous[0].tokens_s
    made = planned(recipe, SMALL, scale=True)
    assert "climb, 2048 sequences a step" in as_text(made) and json.loads(to_json(made))["scaling"]["sizes"]


class _Page(HTMLParser):
    """Titles of the drawings' boxes, and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.addresses: list[str] = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag == "title"
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._open:
            self.titles.append(data)
            self._open = False


def test_the_page_shows_every_role_and_every_phase_and_needs_nothing_else(cuda_recipe: Path, tmp_path: Path) -> None:
    made = planned(load_recipe(cuda_recipe), SMALL)
    write_page(made, tmp_path / "pages" / "plan.html")
    text = (tmp_path / "pages" / "plan.html").read_text()
    page = _Page()
    page.feed(text)
    assert any(re.fullmatch(r"trainer: weights [\d.]+ MiB", title) for title in page.titles)
    assert any(title.startswith("engine: cache ") for title in page.titles)
    assert [t.split(":")[1].split()[0] for t in page.titles if t.startswith("climb: ")] == ["rollout", "train", "sync"]
    assert page.addresses == ["data:,"] and "<script" not in text
    assert "a GPU has 80.0 GiB" in text and "everything fits" in text
