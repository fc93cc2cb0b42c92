"""What the judge learns from: two answers to one chat request, and the verdict of the rule that counts their parts.

The conversation has the form that NVIDIA's GenRM is trained on: the request, the two answers as messages of the roles
response_1 and response_2, and a verdict that reasons and then gives, as JSON, a score from 1 to 5 for each answer and
a ranking from 1 (the first is far better) to 6 (the second is far better). Of two equally good answers the first is
ranked higher, a bias that judges have and that asking in both orders cancels.
"""

from __future__ import annotations

import json
import random
from typing import Any

from tasks.notes import PARTS, NoteTask, parts_of, quality

Row = dict[str, Any]


def ranking(first: int, second: int) -> int:
    """1 to 6 from two scores: far better (by 3 or more), better (2), slightly better (1 or equal), and mirrored."""
    ahead = first - second
    if ahead >= 0:
        return 1 if ahead >= 3 else 2 if ahead == 2 else 3
    return 6 if ahead <= -3 else 5 if ahead == -2 else 4


def verdict(first: str, second: str) -> str:
    """Which parts the first and the second answer have (1) or lack (0), then the scores."""
    parts = zip(PARTS, parts_of(first), parts_of(second), strict=True)
    seen = " ".join(f"{part} {one:d} {two:d}" for part, one, two in parts)
    scores = quality(first), quality(second)
    said = json.dumps({"score_1": scores[0], "score_2": scores[1], "ranking": ranking(*scores)})
    return f"<think>{seen}</think>{said}"


def judged_pair(prompt: str, first: str, second: str) -> Row:
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "response_1", "content": first},
            {"role": "response_2", "content": second},
            {"role": "assistant", "content": verdict(first, second)},
        ]
    }


def draw_pair(task: NoteTask, rng: random.Random) -> Row:
    """Two answers of any quality: careless ones, good ones and what lies between."""
    first, second = (task.draw(rng, rng.choice((0.3, 0.6, 0.9))) for _ in range(2))
    return judged_pair(task.row()["prompt"], first, second)
