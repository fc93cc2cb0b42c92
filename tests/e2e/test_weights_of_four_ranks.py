"""Four ranks that cut a model by tensors, stages and experts give a live engine bitwise what one rank gives it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tiny_checkpoints import write_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from ranks import launch

from millrace.converters.fingerprint import fingerprint

LAYOUT = {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("given"), seed=2)


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks wrote what they found."""
    folder = tmp_path_factory.mktemp("found")
    started_with = write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("started"), seed=1)
    layout = folder / "layout.json"
    layout.write_text(json.dumps(LAYOUT))
    script = Path(__file__).with_name("sync_worker.py")
    launch(script, 4, [str(started_with), str(checkpoint), str(folder), str(layout)], timeout=600)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "engine.json").read_text())


@pytest.mark.parametrize("transport", ["shared_memory", "disk", "gloo"])
def test_the_engine_gets_bitwise_what_one_rank_sends(engine: dict[str, Any], checkpoint: Path, transport: str) -> None:
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        expected = {name: fingerprint(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    many, one = engine[transport], engine["one rank"]
    assert many["fingerprints"] == one["fingerprints"] == expected
    assert many["compared"] == len(expected)  # and each is what every worker of the engine says that it got
    assert many["held"] == one["held"] > 0
    assert many["logprobs"] == one["logprobs"]


def test_ranks_take_turns_where_each_may_send(engine: dict[str, Any]) -> None:
    total = sum(engine["one rank"]["bytes"])
    for transport in ("shared_memory", "disk"):
        assert sum(engine[transport]["bytes"]) == total
        assert max(engine[transport]["bytes"]) < 0.4 * total, engine[transport]["bytes"]


def test_one_rank_of_each_stage_and_group_of_experts_sends_where_senders_are_dear(folder: Path) -> None:
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]
    dense_senders = {0, 2}  # the first of each stage; the others send their own experts alone
    for rank, found in enumerate(ranks):
        few, all_ = found["few_owners=True"], found["few_owners=False"]
        assert few["planned"] == few["owned"] and all_["planned"] == all_["owned"]
        assert (few["owned"] > all_["owned"]) == (rank in dense_senders)
    assert sum(found["few_owners=True"]["owned"] for found in ranks) == sum(
        found["few_owners=False"]["owned"] for found in ranks
    )


@pytest.mark.parametrize("few", [False, True])
def test_no_rank_holds_more_of_the_model_than_the_tensor_under_way(folder: Path, few: bool) -> None:
    ranks = [json.loads((folder / f"{rank}.json").read_text())[f"few_owners={few}"] for rank in range(4)]
    total = sum(found["owned"] for found in ranks)
    largest = max(found["largest"] for found in ranks)
    for found in ranks:
        # The gathered shards, and what the mapping makes of them.
        assert found["peak"] <= 3 * largest < total / 2, (found, largest, total)
