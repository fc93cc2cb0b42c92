"""Rollouts on disk: RUN_DIR/rollouts/STAGE/step-000012.jsonl, written before the step trains on them.

The first line says what the step needs besides the answers; each further line is one answer. A resumed run trains on
the recorded answers instead of sampling again, so that it ends with the very weights of a run that was not stopped,
and a person can read what the model wrote.

Beside it step-000012.streams.jsonl, with a line for each answer in the same order: what its tokens were trained with
(`advantage`, one number for the answer; `teacher_logp`, one for each of its tokens). A teacher's log-probs on record
are used again like the answers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.config.changes import computing_keys
from millrace.config.schema import Recipe
from millrace.environments.base import Reward
from millrace.rollout.types import Rollout
from millrace.stages.groups import Episode, Group, Scored


class RolloutJournal:
    def __init__(self, run_dir: Path, stage: str, recipe: Recipe, built_on: str = "") -> None:
        """`built_on` tells apart what the stage starts from and is taught by: other weights have other rollouts."""
        self._recipe = recipe_mark(recipe, stage) + built_on
        self.folder = run_dir / "rollouts" / stage
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.jsonl"

    def write(self, step: int, header: Mapping[str, Any], groups: Sequence[Group]) -> None:
        """Record a step's groups; a reader sees the whole file or none."""
        self._streams_path(step).unlink(missing_ok=True)  # they are those of the answers before
        answers = (_to_json(group.episode, answer) for group in groups for answer in group.answers)
        _write_lines(self.path(step), [{**header, "recipe": self._recipe}, *answers])

    def write_streams(self, step: int, weight_version: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Record what each answer's tokens are trained with; a reader sees the whole file or none."""
        header = {"weight_version": weight_version, "recipe": self._recipe}
        _write_lines(self._streams_path(step), [header, *answers])

    def read_streams(self, step: int, weight_version: int) -> list[dict[str, Any]] | None:
        """What was recorded for a step with these weights, in the order of the answers, or None."""
        path = self._streams_path(step)
        if not path.exists():
            return None
        header, *answers = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        return answers if header == {"weight_version": weight_version, "recipe": self._recipe} else None

    def _streams_path(self, step: int) -> Path:
        return self.path(step).with_suffix(".streams.jsonl")

    def read(self, step: int, weight_version: int) -> tuple[dict[str, Any], list[Group]] | None:
        """What was recorded for a step with these weights, or None. Answers of other weights, or of a recipe that was
        changed since, are not used."""
        path = self.path(step)
        if not path.exists():
            return None
        lines = path.read_text(encoding="utf-8").splitlines()
        header = json.loads(lines[0])
        if header["weight_version"] != weight_version or header.get("recipe") != self._recipe:
            return None
        groups: dict[str, list[Scored]] = {}
        episodes: dict[str, Episode] = {}
        for line in lines[1:]:
            episode, answer = _from_json(json.loads(line))
            episodes[answer.rollout.request_id] = episode
            groups.setdefault(answer.rollout.request_id, []).append(answer)
        return header, [Group(episodes[key], tuple(answers)) for key, answers in groups.items()]


def recipe_mark(recipe: Recipe, stage: str) -> str:
    """Tells recipes apart by what they compute in a stage: keys that are free to change and other stages do not
    count."""
    return hashlib.sha256(json.dumps(computing_keys(recipe, stage), sort_keys=True).encode()).hexdigest()[:16]


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    aside = path.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _to_json(episode: Episode, answer: Scored) -> dict[str, Any]:
    rollout = answer.rollout
    return {
        "request": rollout.request_id,
        "domain": episode.domain,
        "row": episode.id,
        "seed": episode.seed,
        "index": rollout.index,
        "messages": list(episode.messages),
        "answer": answer.text,
        "reward": answer.reward.value,
        "reason": answer.reward.reason,
        "details": dict(answer.reward.details),
        "masked": answer.reward.masked,
        "cut": answer.cut,
        "finish_reason": rollout.finish_reason,
        "weight_version": rollout.weight_version,
        "engine": rollout.engine,
        "prompt_tokens": list(rollout.prompt),
        "answer_tokens": list(rollout.answer),
        "rollout_logp": list(rollout.rollout_logp),
        "given": [list(span) for span in rollout.given],
    }


def _from_json(line: Mapping[str, Any]) -> tuple[Episode, Scored]:
    prompt = tuple(line["prompt_tokens"])
    episode = Episode(line["row"], line["domain"], {}, line["messages"], prompt, line["seed"])
    rollout = Rollout(
        request_id=line["request"],
        index=line["index"],
        prompt=prompt,
        answer=tuple(line["answer_tokens"]),
        rollout_logp=tuple(line["rollout_logp"]),
        finish_reason=line["finish_reason"],
        weight_version=line["weight_version"],
        engine=line["engine"],
        given=tuple((start, end) for start, end in line["given"]),
    )
    reward = Reward(line["reward"], line["reason"], line["details"], line["masked"])
    return episode, Scored(rollout, line["answer"], reward, line["cut"])
