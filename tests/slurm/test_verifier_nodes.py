"""A job with a node that tests programs and does nothing else."""

import re

import psutil
from real_runs import write_recipe, write_rows
from slurm_runs import SHORT_RL, finish, launch, millrace, processes_of, run_dir_of, said, until, write_site
from tiny_judge import write_by_heart

from millrace.observe.writer import read_metrics
from millrace.rollout.rendezvous import Rendezvous

PROGRAM = "```python\nprint(sum(map(int, input().split())))\n```"
PROMPTS = [f"add {letter}" for letter in "abcdefgh"]


def write_programmer(world):
    """A model that has learnt a program, problems that it solves, and one recipe: two ranks, an engine, a verifier."""
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    write_by_heart(world / "base", PROGRAM, lambda _: prompts, steps=60)
    tests = [{"input": f"{n} 2", "output": str(n + 2)} for n in range(3)]
    rows = [{"prompt": prompt, "tests": tests} for prompt in PROMPTS]
    write_rows(world / "train.jsonl", rows[:4])
    write_rows(world / "held_out.jsonl", rows[4:])
    sandbox, sampling = {"memory_mb": 256}, {"max_response_tokens": 64}
    domain = {"environment": "code", "train": "train.jsonl", "held_out": "held_out.jsonl", "sandbox": sandbox}
    stage = {**SHORT_RL, "domains": ["code"], "steps": 1, "updates_per_batch": 1, "sampling": sampling}
    stage["dynamic_sampling"] = False  # all answers are right
    return write_recipe(
        world,
        "programs",
        stages=[stage],
        domains={"code": domain},
        fleet={"engines": 1, "transport": "disk"},
        placement={"trainer_nodes": 2, "server_nodes": 1, "verifier_nodes": 1},
        evaluation={"every": 0, "samples": 1, "sampling": sampling},
    )


def server_of(recipe):
    """The process that listens on the node that verifies, once it does."""
    for process in processes_of(recipe):
        if "millrace.environments.sandbox.serve" in process.cmdline():
            listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            if listening:
                return process, listening[0].laddr.ip
    return None


def test_programs_are_tested_on_the_node_that_verifies_also_after_its_server_was_killed(cluster, tmp_path):
    recipe = write_programmer(tmp_path)
    run_dir = run_dir_of(recipe)
    (job,) = launch(recipe, write_site(tmp_path))
    until(lambda: server_of(recipe) is not None, recipe)
    server, address = server_of(recipe)
    assert address == cluster.nodes_of(job)[3], "the job's network, and no other"
    server.kill()
    status = millrace("status", run_dir).stdout
    for node, part in enumerate(["rank 0", "rank 1", "engine-0", "2 verifiers"]):
        assert f"node {node}  127.0.0.{11 + node} (127.0.0.{11 + node})  {part}" in status
    finish(cluster, job, recipe)

    log = said(recipe)
    assert "the verifier of node 3 ended with 137; it starts again" in log
    told = re.findall(
        r"sandbox on node 3 tier \w+, (\d+) programs: (\d+) programs, \d+ tests, (\d+) programs passed", log
    )
    assert told[-1] == ("16", "16", "16"), "4 held-out programs, 8 of the step, 4 held-out programs"
    assert [row["reward/mean"] for row in read_metrics(run_dir / "metrics.jsonl") if "reward/mean" in row] == [1.0]
    assert Rendezvous(run_dir / "launch" / f"{job}.0").token() not in log
    assert not processes_of(recipe)
