"""A stage whose episodes have turns, with real engines and a real sandbox: killed and resumed, it loses no bit."""

from pathlib import Path

import pytest
import torch
from real_runs import exported, kill, output, run, start, wait_until, write_recipe, write_rows
from tiny_checkpoints import write_checkpoint
from transformers import AutoModelForCausalLM

from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.python_tool import NAME, TOOLS
from millrace.environments.sandbox.tiers import NoSandboxError, choose_tier
from millrace.observe.report.rollouts import read_groups
from millrace.observe.writer import read_metrics

PROMPTS = ["1+1", "one and one", "2", "twice one"]
RL = {
    "type": "rl",
    "name": "tool",
    "domains": ["tool"],
    "steps": 2,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "sampling": {"max_response_tokens": 220},
    "optimizer": {"lr": 1.0e-3},
}
KEYS = {
    "checkpoint": {"every": 1, "keep": 2},
    "domains": {
        "tool": {
            "environment": "python_tool",
            "train": "train.jsonl",
            "held_out": "held_out.jsonl",
            "sandbox": {"workers": 2},
            "turns": {"most": 4},
        }
    },
    "trainer": {"device": "cpu", "max_tokens_per_micro_batch": 1280, "threads_per_rank": 1},
    "evaluation": {"samples": 1, "max_prompts": 2, "sampling": {"max_response_tokens": 150}},
}


def conversation(prompt: str) -> list[dict]:
    call = f'<tool_call>{{"name": "{NAME}", "arguments": {{"code": "1+1"}}}}</tool_call>'
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": call},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "\\boxed{2}"},
    ]


def learn_to_call(path: Path) -> None:
    """Teach a checkpoint to call the tool, well enough that it mostly does and not always."""
    tokenizer = ChatTokenizer(path)
    texts = [tokenizer.render_conversation(conversation(prompt), tools=list(TOOLS))[0] for prompt in PROMPTS]
    longest = max(len(text.tokens) for text in texts)
    tokens = torch.tensor([text.tokens + [0] * (longest - len(text.tokens)) for text in texts])
    labels = torch.full_like(tokens, -100)
    for row, text in enumerate(texts):
        kept = torch.tensor(text.loss_mask).nonzero().flatten()
        labels[row, kept] = tokens[row, kept]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.04:
            break
    model.save_pretrained(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        choose_tier("auto")
    except NoSandboxError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint("qwen3", folder / "base", seed=1)
    torch.manual_seed(0)
    learn_to_call(folder / "base")
    rows = [{"prompt": prompt, "answer": 2} for prompt in PROMPTS]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "held_out.jsonl", rows[:2])
    return folder


@pytest.mark.slow
def test_a_stage_with_a_tool_that_was_killed_and_resumed_ends_where_an_undisturbed_one_does(
    world: Path, standing_engine: dict
) -> None:
    keys = {**KEYS, "fleet": {"max_model_len": 1280, "max_num_seqs": 16, **standing_engine}}
    whole = write_recipe(world, "whole", stages=[RL], **keys)
    assert run(whole) == 0, output(whole)
    killed = write_recipe(world, "killed", stages=[RL], **keys)
    run_dir = world / "runs" / "killed"
    process = start(killed)
    assert wait_until((run_dir / "rollouts" / "tool" / "step-000001.jsonl").exists, process, killed), output(killed)
    kill(process)
    assert run(killed) == 0, output(killed)

    ours, theirs = exported(world / "runs" / "whole"), exported(run_dir)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    metrics = {row["step"]: row for row in read_metrics(run_dir / "metrics.jsonl") if row["stage"] == "tool"}
    assert any(row["grad_norm"] > 0 for row in metrics.values()), "equal weights say something only if they moved"
    assert all(row["mismatch/mean"] < 1e-4 for row in metrics.values())
    assert all(row["episode/turns"] > 1 and row["reward/masked"] == 0 for row in metrics.values())

    tokenizer = ChatTokenizer(world / "base")
    answers = [
        a for group in read_groups(run_dir / "rollouts" / "tool" / "step-000000.jsonl", 1 << 30) for a, _ in group
    ]
    called = [answer for answer in answers if answer["details"].get("calls") and len(answer["given"]) == 1]
    assert called
    for answer in called:
        ((begin, end),) = answer["given"]
        assert answer["rollout_logp"][begin:end] == [0.0] * (end - begin)
        text = tokenizer.decode(answer["answer_tokens"][begin:end], skip_special=False)
        assert text.startswith("\n<|im_start|>tool\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
