"""The folder of a run as Millrace leaves it: four domains, a side branch, gates that pass and fail, and MOPD.

Written without torch, by the formats of the ledger, the metrics and the rollout journal. Math RL costs instruction
following, the gate warns, and MOPD brings it back from its teacher; plain RL from the same checkpoint lies beside it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from millrace.config.loading import dump_recipe, load_recipe

DOMAINS = ("math", "instruction_following", "mcqa", "chat")
FACTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 600,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 96,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
RECIPE = """\
name: cascade-sample
run_dir: {run_dir}
seed: 7
model: {{path: {model}}}
trainer: {{device: cpu}}
judges: {{genrm: {{url: "http://127.0.0.1:1/v1"}}}}
domains:
  math: {{environment: math, train: math.jsonl, held_out: math.jsonl}}
  instruction_following: {{environment: instruction_following, train: if.jsonl, held_out: if.jsonl}}
  mcqa: {{environment: mcqa, train: mcqa.jsonl, held_out: mcqa.jsonl}}
  chat: {{environment: genrm, judge: genrm, train: chat.jsonl, held_out: chat.jsonl}}
evaluation: {{every: 5, keep: true}}
stages:
  - {{type: sft, name: sft, data: [sft.jsonl], steps: {steps}}}
  - {{type: rl, name: if-rl, domains: [instruction_following], steps: {steps}, prompts_per_step: 16,
      samples_per_prompt: 4, gate: {{min_gain: 5, max_drop: 4}}}}
  - {{type: rlhf, name: rlhf, from: sft, domains: [chat], steps: {steps}, prompts_per_step: 16, samples_per_prompt: 4}}
  - {{type: rl, name: math-rl, from: if-rl, domains: [math, mcqa], steps: {steps}, prompts_per_step: 16,
      samples_per_prompt: 4, gate: {{min_gain: 5, max_drop: 4, on_failure: warn}}}}
  - {{type: rl, name: grpo-again, from: math-rl, domains: [instruction_following], steps: {steps}, prompts_per_step: 16,
      samples_per_prompt: 4}}
  - {{type: mopd, name: mopd, from: math-rl, steps: {steps}, prompts_per_step: 16, samples_per_prompt: 4,
      teachers: {{math: best(math), instruction_following: stage(if-rl), mcqa: best(mcqa), chat: stage(rlhf)}}}}
"""
BEGAN = 1_790_000_000.0


@dataclass(frozen=True)
class Told:
    """What happened in a stage: its parent, held-out rates in percent at its end, and the rewards it climbs between."""

    type: str
    parent: str
    rates: tuple[float, ...]
    rewards: dict[str, tuple[float, float]]


STORY = {
    "sft": Told("sft", "start", (31.5, 42.0, 55.0, 40.0), {}),
    "if-rl": Told("rl", "sft", (32.5, 68.5, 54.0, 41.0), {"instruction_following": (0.40, 0.74)}),
    "rlhf": Told("rlhf", "sft", (31.0, 44.0, 54.5, 61.0), {"chat": (-0.2, 0.5)}),
    "math-rl": Told("rl", "if-rl", (58.5, 54.0, 61.0, 38.0), {"math": (0.3, 0.66), "mcqa": (0.5, 0.64)}),
    "grpo-again": Told("rl", "math-rl", (53.0, 66.0, 59.5, 39.0), {"instruction_following": (0.52, 0.70)}),
    "mopd": Told(
        "mopd",
        "math-rl",
        (57.5, 67.5, 62.0, 58.5),
        {"math": (0.62, 0.66), "instruction_following": (0.52, 0.73), "mcqa": (0.62, 0.65), "chat": (0.1, 0.45)},
    ),
}
START_RATES = (6.0, 21.0, 27.5, 18.0)
TEACHERS = {"math": "math-rl", "instruction_following": "if-rl", "mcqa": "math-rl@5", "chat": "rlhf"}
GATES = {
    "if-rl": {
        "passed": True,
        "action": "none",
        "reason": "instruction_following gained 26.5 ± 8.1 points, at least 5 were asked for; no other domain fell.",
        "checks": [
            {"domain": "instruction_following", "kind": "gain", "limit": 5.0, "change": 26.5, "half_width": 8.1},
            {"domain": "mcqa", "kind": "drop", "limit": 4.0, "change": -1.0, "half_width": 8.4},
        ],
    },
    "math-rl": {
        "passed": False,
        "action": "warn",
        "reason": "instruction_following fell by 14.5 ± 8.2 points, more than the 4 that are allowed.",
        "checks": [
            {"domain": "math", "kind": "gain", "limit": 5.0, "change": 26.0, "half_width": 8.0},
            {"domain": "instruction_following", "kind": "drop", "limit": 4.0, "change": -14.5, "half_width": 8.2},
        ],
    },
}
QUESTIONS = {
    "math": "A crate holds {a} apples and {b} pears. How many pieces of fruit are in {c} crates?",
    "instruction_following": "Name {a} rivers of Europe. Write no comma, and end with the word 'done'.",
    "mcqa": "Which of these is a prime number?\nA) {a}0\nB) {b}4\nC) 13\nD) 2{c}5",
    "chat": "My neighbour is moving away after {a} years. What could I write on a card?",
}
ANSWERS = {
    "math": "<think>\nOne crate: {a} + {b} pieces.\nTimes {c} ≈ done ✓\n</think>\nThere are \\boxed{{{d}}} pieces.",
    "instruction_following": "The Danube and the Rhône and the Elbe and the Vltava flow there; done",
    "mcqa": "<think>\n{a}0 is even, {b}4 is even, 2{c}5 ends in 5.\n</think>\nAnswer: C",
    "chat": "Thank you for {a} good years next door — the coffee’s on whenever you’re back. 谢谢!",
}


def write_sample_run(folder: Path, *, steps: int = 20, until: str | None = None, answers: bool = True) -> Path:
    """Write FOLDER/base (the model) and FOLDER/run; returns the latter. `until`: stop in the middle of that stage."""
    model, run = folder / "base", folder / "run"
    model.mkdir(parents=True)
    run.mkdir()
    (model / "config.json").write_text(json.dumps(FACTS))
    tokenizer = _tokenizer()
    tokenizer.save(str(model / "tokenizer.json"))
    (folder / "written.yaml").write_text(RECIPE.format(run_dir=run, model=model, steps=steps))
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(folder / "written.yaml")))
    versions = {"python": "3.11.7", "millrace": "0.1.0", "torch": "2.13.0", "megatron-core": "0.16.1", "vllm": "0.32.0"}
    (run / "versions.json").write_text(json.dumps(versions))
    events, rows = _history(steps, until)
    (run / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if answers:
        _write_rollouts(run, {row["stage"] for row in rows}, tokenizer, steps)
    return run


def _history(steps: int, until: str | None) -> tuple[list[dict], list[dict]]:
    draw, clock = random.Random(7), BEGAN
    events: list[dict] = [_evaluated("start", START_RATES, clock)]
    rows: list[dict] = []
    update = 0
    for name, told in STORY.items():
        halted = name == until
        clock += 20
        events.append(_started(name, told, update, clock))
        for step in range(1, (steps // 2 if halted else steps) + 1):
            update += 1
            rows.append({"step": update, "stage": name, **_metrics(told, step, steps, draw)})
            clock += rows[-1]["time/step"]
            if step % 5 == 0 and step < steps and told.type != "sft" and steps <= 50:
                before = STORY[told.parent].rates
                between = tuple(a + (b - a) * step / steps for a, b in zip(before, told.rates, strict=True))
                events.append(_evaluated(f"{name}@{step}", between, clock, stage=name))
        if halted:
            return events, rows
        own = [row for row in rows if row["stage"] == name]
        events += _end(name, told, update, own, clock)
    events += [
        {"event": "exported", "time": clock + 9, "path": "export", "step": update},
        {"event": "finished", "time": clock + 10, "stages": list(STORY)},
    ]
    return events, rows


def _started(name: str, told: Told, update: int, clock: float) -> dict:
    event = {"event": "stage_started", "time": clock, "stage": name, "type": told.type, "parent": told.parent}
    teachers = TEACHERS if told.type == "mopd" else {}
    return {**event, "parent_checkpoint": f"step-{update:08d}", "teachers": teachers, "step": update}


def _end(name: str, told: Told, update: int, rows: list[dict], clock: float) -> list[dict]:
    end = {"event": "stage_finished", "time": clock, "stage": name, "step": update, "checkpoint": f"step-{update:08d}"}
    for fact, metric in (("seconds", "time/step"), ("tokens_trained", "tokens"), ("flops", "flops")):
        end[fact] = sum(row[metric] for row in rows)
    end["tokens_sampled"] = sum(row.get("tokens/sampled", 0.0) for row in rows)
    events = [end, _evaluated(name, told.rates, clock + 5)]
    if name in GATES:
        gate = GATES[name]
        checks = [{**check, "passed": _holds(check)} for check in gate["checks"]]
        events.append({"event": "gate", "time": clock + 6, "stage": name, "result": name, **gate, "checks": checks})
    return events


def _holds(check: dict) -> bool:
    return check["change"] >= check["limit"] if check["kind"] == "gain" else check["change"] >= -check["limit"]


def _evaluated(label: str, rates: tuple[float, ...], clock: float, **facts: str) -> dict:
    scores = {}
    for domain, rate in zip(DOMAINS, rates, strict=True):
        p = rate / 100
        half_width = 1.96 * math.sqrt(p * (1 - p) / 256)
        scores[domain] = {"pass_rate": p, "half_width": half_width, "prompts": 256, "answers": 512}
    return {"event": "evaluated", "time": clock, "after": label, "scores": scores, **facts}


def _metrics(told: Told, step: int, steps: int, draw: random.Random) -> dict[str, float]:
    done = 1 - math.exp(-3 * step / steps)
    values = {"grad_norm": 0.8 * math.exp(draw.gauss(0, 0.25)), "lr": 3e-6, "tokens": 9000 + draw.randrange(900)}
    values["flops"] = 6.0 * 1.1e6 * values["tokens"]
    times = {"train": 3.1 + draw.random()}
    if told.type == "sft":
        values["loss"] = 1.1 + 2.4 * (1 - done) + draw.gauss(0, 0.04)
        times["data"] = 0.1
    else:
        values |= _sampled(told, done, draw)
        times |= {"rollout": 6.5 + 2 * draw.random(), "sync": 0.4 + 0.1 * draw.random()}
    if told.type == "rlhf":
        values |= {"judge/verdicts": 192.0, "judge/failed": 0.0, "judge/unparsable": 0.01, "judge/first_wins": 0.5}
        values["kl"] = 0.04 * done + abs(draw.gauss(0, 0.004))
    if told.type == "mopd":
        times["teacher"] = 1.6 + draw.random()
        values |= {f"reverse_kl/{d}": (0.3 + 0.2 * i) * (1.05 - done) for i, d in enumerate(told.rewards)}
        values |= {f"taught/{domain}": 0.25 for domain in told.rewards}
    timed = {f"time/{phase}": seconds for phase, seconds in times.items()}
    return {**values, **timed, "time/step": sum(times.values())}


def _sampled(told: Told, done: float, draw: random.Random) -> dict[str, float]:
    rewards = {d: low + (high - low) * done + draw.gauss(0, 0.025) for d, (low, high) in told.rewards.items()}
    mean = sum(rewards.values()) / len(rewards)
    return {
        "loss": draw.gauss(0, 0.01),
        "reward/mean": mean,
        **{f"reward/{domain}": reward for domain, reward in rewards.items()},
        "reward/solved": max(0.0, mean),
        "reward/length": 62 - 14 * done + draw.gauss(0, 1.5),
        "reward/overlong": 0.02,
        "entropy": 0.9 - 0.4 * done + draw.gauss(0, 0.02),
        "mismatch/mean": 4e-7 * math.exp(draw.gauss(0, 0.2)),
        "mismatch/masked": 0.0,
        "groups/without_variance": 0.2 + 0.2 * done + draw.gauss(0, 0.03),
        "groups/played": 16.0,
        "tokens/sampled": 3600.0 + draw.randrange(300),
    }


def _write_rollouts(run: Path, stages: set[str], tokenizer: Tokenizer, steps: int) -> None:
    for name in [name for name in STORY if name in stages and STORY[name].rewards]:
        folder = run / "rollouts" / name
        folder.mkdir(parents=True)
        for step in sorted({0, steps // 4, steps // 2, steps - 1}):
            lines = list(_rollouts(STORY[name], step, steps, tokenizer))
            header = {"step": step, "weight_version": step, "metrics": {}}
            _write_lines(folder / f"step-{step:06d}.jsonl", header, [answer for answer, _ in lines])
            if STORY[name].type == "mopd":
                _write_lines(folder / f"step-{step:06d}.streams.jsonl", {"step": step}, [stream for _, stream in lines])


def _write_lines(file: Path, header: dict, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in [header, *lines]), encoding="utf-8")


def _rollouts(told: Told, step: int, steps: int, tokenizer: Tokenizer) -> Iterator[tuple[dict, dict]]:
    """The answers of a step, each with its streams."""
    draw = random.Random(step)
    for group in range(8):
        domain = list(told.rewards)[group % len(told.rewards)]
        low, high = told.rewards[domain]
        numbers = {name: draw.randrange(2, 9) for name in "abc"}
        numbers["d"] = (numbers["a"] + numbers["b"]) * numbers["c"]
        question = QUESTIONS[domain].format(**numbers)
        for index in range(4):
            right = draw.random() < low + (high - low) * step / steps + 0.1
            said = numbers if right else {**numbers, "d": numbers["d"] + draw.randrange(1, 9)}
            text = ANSWERS[domain].format(**said) + ("" if right else " or so")
            ids = tokenizer.encode(text + "<|im_end|>").ids
            logp = [round(-draw.expovariate(2), 4) for _ in ids]
            answer = _answer(domain, f"{domain}/{group}/{step}", group, index, question, text, right, ids, logp)
            gaps = [draw.gauss(0.0 if right else -0.35, 0.4) for _ in ids]
            teacher = [min(0.0, a + gap) for a, gap in zip(logp, gaps, strict=True)]
            yield answer, {"advantage": [t - s for t, s in zip(teacher, logp, strict=True)], "teacher_logp": teacher}


def _answer(
    domain: str,
    request: str,
    row: int,
    index: int,
    question: str,
    text: str,
    right: bool,
    ids: list[int],
    logp: list[float],
) -> dict:
    return {
        "request": request,
        "domain": domain,
        "row": f"{domain}.jsonl:{row + 1}",
        "seed": row,
        "index": index,
        "messages": [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": question}],
        "answer": text,
        "reward": 1.0 if right else 0.0,
        "reason": "correct" if right else "the answer differs from the expected one",
        "details": {"expected": "…", "checked": ["format", "value"]},
        "finish_reason": "stop",
        "weight_version": 3,
        "engine": 0,
        "prompt_tokens": list(range(20)),
        "answer_tokens": ids,
        "rollout_logp": logp,
    }


def _tokenizer() -> Tokenizer:
    """A byte-level BPE that has seen the sample's own texts, so that tokens are pieces of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=FACTS["vocab_size"],
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.replace("✓", "") for text in ANSWERS.values()] * 3, trainer)
    return tokenizer
