"""A bounded choice of a run's rollouts for the viewer: the answers' tokens with what each of them was told to do.

A run may hold terabytes of rollouts and the page has to stay small, so of each stage a few steps are shown, of each
step a few groups, and of long answers the beginning and the end. The page says what was left out.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from millrace.config.schema import AdvantageConfig, SamplingStage
from millrace.observe.lines import parse_line
from millrace.observe.report.curves import rounded
from millrace.observe.report.record import RunRecord, StageRecord, model_folders
from millrace.observe.report.tokens import find_tokenizer, token_texts

Answer = Mapping[str, Any]
"""A line of a step's rollouts."""
Streams = Mapping[str, Any]
"""A line of the file beside it: `advantage` of the whole answer or of each token, `teacher_logp` of each token."""


@dataclass(frozen=True)
class Bounds:
    """How much of a run the page takes in."""

    steps: int = 5
    """Recorded steps of a stage: the first, the last and evenly between."""
    groups: int = 8
    """Prompts of a step, taken evenly from its domains."""
    answers: int = 8
    """Answers to a prompt."""
    head: int = 700
    """Tokens shown from the beginning of an answer."""
    tail: int = 300
    """Tokens shown from its end."""
    tokens: int = 40_000
    """Tokens of a stage; once they are used up, no further group is taken."""
    characters: int = 4_000
    """Characters of a prompt's message, and of the details of a reward."""
    file_bytes: int = 8 << 20
    """Only so much is read of one step's file."""


def rollout_data(run: RunRecord, bounds: Bounds | None = None) -> dict[str, Any]:
    """What the viewer shows: {"stages": [{"name", "type", "steps": [{"step", "groups"}], "recorded"}], "note"}."""
    bounds = bounds or Bounds()
    tokenizer = find_tokenizer(model_folders(run.folder, run.recipe))
    stages = [_stage(stage, run.folder / "rollouts" / stage.name, tokenizer, bounds) for stage in run.stages]
    note = "" if tokenizer else _NO_TOKENIZER
    return {"stages": [stage for stage in stages if stage["steps"]], "note": note}


_NO_TOKENIZER = "No tokenizer.json was found at model.path or beside a checkpoint, so answers are plain text."


def _stage(stage: StageRecord, folder: Path, tokenizer: Tokenizer | None, bounds: Bounds) -> dict[str, Any]:
    files = _step_files(folder, stage)
    left, steps = bounds.tokens, []
    chosen = evenly(files, bounds.steps)
    for done, file in enumerate(chosen):
        groups, used = _step(file, stage, tokenizer, bounds, left // (len(chosen) - done))
        left -= used
        if groups:
            steps.append({"step": int(file.stem.split("-")[1]) + 1, "groups": groups})
    return {"name": stage.name, "type": stage.type, "recorded": len(files), "steps": steps}


def _step_files(folder: Path, stage: StageRecord) -> list[Path]:
    """The recorded steps. Files of steps that lie ahead are from before the stage was rewound."""
    files = sorted(file for file in folder.glob("step-*.jsonl") if not file.name.endswith(".streams.jsonl"))
    return [file for file in files if not stage.rows or int(file.stem.split("-")[1]) <= stage.steps]


def evenly(items: Sequence, most: int) -> list:
    """At most so many of the items, evenly spread; the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _step(
    file: Path, stage: StageRecord, tokenizer: Tokenizer | None, bounds: Bounds, tokens: int
) -> tuple[list[dict[str, Any]], int]:
    """The chosen groups of a step, and how many tokens they have. At least one group is taken."""
    groups = read_groups(file, bounds.file_bytes)
    chosen: list[dict[str, Any]] = []
    used = 0
    for group in spread_over_domains(groups, bounds.groups):
        if chosen and used >= tokens:
            break
        shown = _group(group, stage, tokenizer, bounds)
        used += sum(len(answer.get("tokens", ())) for answer in shown["answers"])
        chosen.append(shown)
    return chosen, used


def read_groups(file: Path, most_bytes: int) -> list[list[tuple[Answer, Streams]]]:
    """The groups of a step's file, each answer with its streams ({} where they were not recorded)."""
    beside = _lines(file.with_suffix(".streams.jsonl"), most_bytes)
    groups: dict[str, list[tuple[Answer, Streams]]] = {}
    for answer in _lines(file, most_bytes):
        streams = next(beside, None) or {}
        if answer is not None and "request" in answer:
            groups.setdefault(answer["request"], []).append((answer, streams))
    return list(groups.values())


def _lines(file: Path, most_bytes: int) -> Iterator[dict[str, Any] | None]:
    """The lines behind the header, as far as the first `most_bytes` go; at least one of them."""
    if not file.exists():
        return
    with file.open("rb") as lines:
        next(lines, None)
        for line in lines:
            yield parse_line(line)
            if lines.tell() >= most_bytes:
                return


def spread_over_domains(groups: Sequence[list], most: int) -> list[list]:
    """At most so many groups, the domains in turn, each domain's evenly spread over the step."""
    by_domain: dict[str, list] = {}
    for group in groups:
        by_domain.setdefault(group[0][0]["domain"], []).append(group)
    share = math.ceil(most / max(1, len(by_domain)))
    queues = [evenly(queue, share) for queue in by_domain.values()]
    turns = (queue[i] for i in range(share) for queue in queues if i < len(queue))
    return [group for _, group in zip(range(most), turns, strict=False)]


def _group(
    group: Sequence[tuple[Answer, Streams]], stage: StageRecord, tokenizer: Tokenizer | None, bounds: Bounds
) -> dict[str, Any]:
    first = group[0][0]
    config = stage.config.advantage if isinstance(stage.config, SamplingStage) else AdvantageConfig()
    counted = iter(group_advantages([answer["reward"] for answer, _ in group if not answer.get("masked")], config))
    advantages = [0.0 if answer.get("masked") else next(counted) for answer, _ in group]
    shown = list(zip(group, advantages, strict=True))[: bounds.answers]
    return {
        "domain": first["domain"],
        "row": first["row"],
        "prompt_tokens": len(first["prompt_tokens"]),
        "messages": [_message(message, bounds.characters) for message in first["messages"]],
        "of": len(group),
        "answers": [_answer(answer, streams, value, tokenizer, bounds) for (answer, streams), value in shown],
    }


def group_advantages(rewards: Sequence[float], config: AdvantageConfig) -> list[float]:
    """Advantages of one group from its rewards, as `algorithms.advantages` defines them; 0 where all are equal."""
    if len(set(rewards)) <= 1:
        return [0.0] * len(rewards)
    return [_advantage(i, rewards, config) for i in range(len(rewards))]


def _advantage(i: int, rewards: Sequence[float], config: AdvantageConfig, eps: float = 1e-6) -> float:
    compared = [*rewards[:i], *rewards[i + 1 :]] if config.baseline == "leave_one_out" else rewards
    difference = rewards[i] - statistics.fmean(compared)
    std = statistics.stdev(compared) if len(compared) > 1 else 0.0
    divisible = config.scale == "std" and std > eps * max(map(abs, rewards))
    return difference / (std + eps) if divisible else difference


def _message(message: Mapping[str, Any], most: int) -> dict[str, str]:
    content = message.get("content")
    extra = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content, ensure_ascii=False)
    text = "\n".join([part for part in (text, json.dumps(extra, ensure_ascii=False) if extra else "") if part])
    return {"role": str(message.get("role", "")), "text": _shortened(text, most)}


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n… {len(text) - most:,} characters left out …\n{text[-most // 2 :]}"


def _answer(
    answer: Answer, streams: Streams, advantage: float, tokenizer: Tokenizer | None, bounds: Bounds
) -> dict[str, Any]:
    length = len(answer["answer_tokens"])
    shown: dict[str, Any] = {
        "reward": rounded(answer["reward"]),
        "reason": answer["reason"],
        "details": _details(answer.get("details"), bounds.characters),
        "finish": answer["finish_reason"],
        "length": length,
        "masked": bool(answer.get("masked")),
        "cut": answer.get("cut"),
        "turns": len(answer.get("given", ())) + 1,
    }
    given = streams.get("advantage", advantage)
    if tokenizer is None:
        mean = statistics.fmean(given) if isinstance(given, list) and given else given or 0.0
        return {**shown, "text": _shortened(answer["answer"], bounds.characters), "advantage": rounded(mean)}
    head = length if length <= bounds.head + bounds.tail else bounds.head
    keep = [*range(head), *range(max(head, length - bounds.tail), length)]
    ids = answer["answer_tokens"]
    tail = ids[length - (len(keep) - head) :]
    texts = token_texts(tokenizer, ids[:head]) + token_texts(tokenizer, tail)
    turns = turn_of_each_token(length, answer.get("given", ()))
    teacher = streams.get("teacher_logp")
    numbers = {
        "advantage": given if isinstance(given, list) or len(set(turns)) < 2 else [given if n else None for n in turns],
        "sampled": _at_turns(answer.get("rollout_logp"), turns),
        "teacher": None if teacher is None else _spread(teacher, turns),
    }
    return {
        **shown,
        "tokens": texts,
        "head": head,
        **({"turn": [turns[place] for place in keep]} if len(set(turns)) > 1 else {}),
        **{name: _kept(values, keep) for name, values in numbers.items() if values is not None},
    }


def turn_of_each_token(length: int, given: Sequence[Sequence[int]]) -> list[int]:
    """The number of the policy's turn that each of an answer's tokens belongs to, from 1; 0 for the environment's."""
    turns, turn, begin = list[int](), 1, 0
    for start, end in given:
        turns += [turn] * (start - begin) + [0] * (end - start)
        turn, begin = turn + 1, end
    return turns + [turn] * (length - begin)


def _at_turns(values: Sequence[float] | None, turns: Sequence[int]) -> list[float | None] | None:
    """The numbers of an answer's tokens, none at the environment's."""
    if values is None:
        return None
    return [value if turn else None for value, turn in zip(values, turns, strict=False)]


def _spread(values: Sequence[float], turns: Sequence[int]) -> list[float | None]:
    """Numbers that the policy's tokens alone have, at the places of those tokens."""
    own = iter(values)
    return [next(own, None) if turn else None for turn in turns]


def _kept(values: float | Sequence[float | None], keep: Sequence[int]) -> float | list[float | None]:
    """The numbers of the shown tokens; a single one is the whole answer's."""
    if isinstance(values, int | float):
        return rounded(values, 4)
    return [_finite(values[i]) if i < len(values) else None for i in keep]


def _finite(value: float | None) -> float | None:
    return rounded(value, 4) if value is not None and math.isfinite(value) else None


def _details(details: Mapping[str, Any] | None, most: int) -> str:
    return _shortened(json.dumps(details, ensure_ascii=False, indent=1), most) if details else ""
