"""Whatever layout the rules accept for a mixture of experts gives the gradient of one rank.

Each layout takes seconds, most of them to connect its process groups, so that of four ranks only those are run here
which cut experts both ways; MILLRACE_LAYOUTS=all runs every one, a matter of minutes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from tiny_checkpoints import write_checkpoint

from millrace.config.model_shape import ModelShape
from millrace.config.rules import layout_problems
from millrace.config.schema import ParallelConfig
from millrace.ports import free_port

SIZES = (1, 2, 4)
ALL = os.environ.get("MILLRACE_LAYOUTS") == "all"
MODELS: dict[str, dict[str, Any]] = {"qwen3_moe": {}}
if ALL:
    MODELS["nemotron_h"] = {"hybrid_override_pattern": "ME*E"}


def accepted(shape: ModelShape, ranks: int) -> Iterator[dict[str, Any]]:
    """All layouts of so many ranks that the rules accept."""
    for tp, pp, cp, dp, ep, etp in itertools.product(SIZES, repeat=6):
        layout = ParallelConfig(tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, etp=etp, sequence_parallel=tp > 1)
        if layout.world_size != ranks or (ranks // pp) % (ep * etp):
            continue
        if ranks == 4 and not ALL and (ep, etp) != (2, 2):
            continue
        if shape.mamba is not None and cp > 1:  # refused on CPU
            continue
        if not any(layout_problems(layout, shape)):
            yield dataclasses.asdict(layout)


@pytest.mark.parametrize("family", MODELS)
def test_every_accepted_layout_has_the_gradient_of_one_rank(
    family: str, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    model = write_checkpoint(family, tmp_path / family, **MODELS[family])
    shape = ModelShape.from_hf(model)
    found: dict[str, list[dict[str, Any]]] = {}
    for world in SIZES:
        defaults = {"model": str(model), "trainer": {}, "dtype": "float32", "gradient_alone": True}
        cases = [{**defaults, "name": _name(p), "parallel": p, "port": free_port()} for p in accepted(shape, world)]
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        launch(Path(__file__).with_name("layout_worker.py"), world, [str(tmp_path / "cases.json"), str(tmp_path)], 900)
        for case in cases:
            files = [tmp_path / f"{case['name']}-{rank}.pt" for rank in range(world)]
            found[case["name"]] = [torch.load(file, weights_only=False) for file in files]
    one = found.pop("one")[0]
    worst = {name: _difference(ranks, one["gradients"]) for name, ranks in found.items()}
    record_property("layouts", len(worst))
    record_property("gradients", max(worst.values()))
    assert len(worst) >= 14
    assert {name: far for name, far in worst.items() if far > 1e-5} == {}
    for name, ranks in found.items():
        assert ranks[0]["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-5), name


def _name(parallel: dict[str, Any]) -> str:
    return "".join(f"{key}{size}" for key, size in parallel.items() if size > 1 and size is not True) or "one"


def _difference(ranks: list[dict[str, Any]], expected: dict[str, torch.Tensor]) -> float:
    """Largest norm(found - expected) / norm(expected) of any tensor; each tensor comes from one rank only."""
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        assert not whole.keys() & rank["gradients"].keys()
        whole |= rank["gradients"]
    assert whole.keys() == expected.keys()
    return max(float((whole[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items())
