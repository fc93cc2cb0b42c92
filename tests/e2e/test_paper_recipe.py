"""Every stage of the recipe of Nemotron-Cascade 2 as it is written, two steps each, with a tiny hybrid that SFT teaches
to end its answers, a row or two for each domain, and a scripted judge. Sizes and places are replaced, nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from judge_server import Said, judge_server
from real_runs import output, run, write_rows
from tiny_checkpoints import write_checkpoint

from millrace.cascade.ledger import Ledger
from millrace.config.loading import load_recipe
from millrace.environments.workplace.generate import generated_office
from millrace.environments.workplace.tasks import distinct_tasks
from millrace.observe.writer import read_metrics

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = RECIPES / "nemotron-cascade-2" / "cascade.yaml"
SHORT = 40
"""Tokens of an answer."""
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": said}]}
    for n in range(8)
    for said in ("a, b", "a b")
]
"""Answers that end, half of them with a comma, so that IF-RL has something to learn."""
SFT_STEPS = 60
CODE = "def area(width, height):\n    return width + height\n"
GOLDEN = """\
--- a/shapes.py
+++ b/shapes.py
@@ -1,2 +1,2 @@
 def area(width, height):
-    return width + height
+    return width * height
"""
ROWS: dict[str, list[dict[str, Any]]] = {
    "instruction_following": [
        {"prompt": f"say {n}", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} for n in range(4)
    ],
    "stem_mcqa": [{"prompt": "1+1 is?", "options": [{"A": "2"}, {"B": "3"}], "expected_answer": "A"}],
    "structured_outputs": [{"prompt": "as JSON", "schema_str": '{"type": "object"}', "schema_type": "json"}],
    "math": [{"prompt": "1+1", "answer": "2"}],
    "chat": [{"prompt": "hello", "reference": "hi"}],
    "workplace_assistant": [task.row("needed") for task in distinct_tasks(generated_office(), 1, 2, most_calls=1)],
    "long_context": [{"prompt": "Document 1: Ann is 30.\n\nHow old is Ann?", "answer": "30"}],
    "code": [{"prompt": "add", "tests": [{"input": "1 2", "output": "3"}]}],
    "swe_agentless": [
        {
            "instance_id": "s",
            "golden_patch": GOLDEN,
            "relevant_file_contents": {"shapes.py": CODE},
            "original_prompt": ".",
        }
    ],
}


def verdict(request: dict[str, Any]) -> Said:
    asked = json.dumps(request["messages"])
    if "VERDICT" in asked:
        return Said("VERDICT: CORRECT")
    return Said('{"score_1": 4, "score_2": 2, "ranking": 2, "score": 7}')


def write_recipe(folder: Path, judge: str) -> Path:
    """The paper's recipe with what this machine can hold, as a recipe that extends it."""
    paper = load_recipe(RECIPE)
    for name, rows in ROWS.items():
        for file in ("train", "held_out"):
            path = folder / "prompts" / name / f"{file}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(path, rows)
    agentic = folder / "prompts" / "swe_agentic"
    agentic.mkdir()
    script = [sys.executable, str(RECIPES / "laptop" / "make_repositories.py"), str(agentic)]
    subprocess.run(script, check=True, timeout=120)
    write_rows(folder / "sft.jsonl", CONVERSATIONS)
    write_checkpoint(
        "nemotron_h", folder / "base", seed=1, hybrid_override_pattern="ME*-MEM", max_position_embeddings=8192
    )
    judges = {name: {"model": None, "url": judge, "concurrency": 4} for name in paper.judges}
    small: dict[str, Any] = {
        "extends": str(RECIPE),
        "run_dir": str(folder / "run"),
        "x-data": str(folder),
        "x-adamw": {"warmup_steps": 0},
        "model": {"path": str(folder / "base"), "dtype": "float32", "chat_template": "nemotron"},
        "trainer": {"device": "cpu", "max_tokens_per_micro_batch": 4096},
        "fleet": {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": 16, "kv_cache_bytes": 1 << 26},
        "judges": judges,
        "domains": {
            "instruction_following": {"thinking": False},  # as the conversations of SFT
            "workplace_assistant": {"tables": None},
            "swe_agentic": {"swe": {"container": "bubblewrap", "repositories": str(agentic / "repositories")}},
        },
        "evaluation": {"every": 2, "samples": 1, "max_prompts": 1, "sampling": {"max_response_tokens": 8}},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(small, sort_keys=False), encoding="utf-8")
    return path


def small_stages() -> list[str]:
    """The sizes of each stage, as values on the command line."""
    words = []
    for stage in load_recipe(RECIPE).stages:
        sizes: dict[str, Any] = {"steps": 2}
        if stage.type == "sft":
            sizes |= {"steps": SFT_STEPS, "global_batch": 16, "max_length": 512, "optimizer.lr": 3e-3}
        else:
            sizes |= {"prompts_per_step": 1, "samples_per_prompt": 2, "sampling.max_response_tokens": SHORT}
        if stage.name in ("sft", "mopd", "swe-agentic"):  # the others share theirs
            sizes |= {"optimizer.warmup_steps": 0}
        if stage.name == "if-rl":
            sizes |= {"samples_per_prompt": 8}
        words += [f"stages.{stage.name}.{key}={value}" for key, value in sizes.items()]
    return words


@pytest.mark.slow
def test_every_stage_of_the_paper_runs_two_steps(tmp_path: Path) -> None:
    with judge_server(verdict) as server:
        recipe = write_recipe(tmp_path, server.url)
        data = f"stages.sft.data=[{tmp_path / 'sft.jsonl'}]"
        assert run(recipe, data, *small_stages()) == 0, output(recipe)
    names = [stage.name for stage in load_recipe(RECIPE).stages]
    finished = [event["stage"] for event in Ledger(tmp_path / "run").events("stage_finished")]
    assert finished == names
    steps = [row["stage"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert {name: steps.count(name) for name in names} == dict.fromkeys(names, 2) | {"sft": SFT_STEPS}
