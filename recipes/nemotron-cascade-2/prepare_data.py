"""Sort the released prompts of Nemotron-Cascade 2 by domain, and hold some of each out.

    python recipes/nemotron-cascade-2/prepare_data.py --data data --held-out 256

The released files mix domains and have no held-out part. A row's verifier fields say which domain it belongs to; it is
copied as it stands, so that NeMo-Gym's rows stay what they are. Only AceReason-Math and HelpSteer3, which are no RL
rows yet, are rewritten as prompts. What is held out is drawn by the hash of its prompt: the same rows whatever their
order, and no prompt stands on both sides.

Read, below --data (README.md tells how they get there; what is absent is left out, and said):

    Nemotron-Cascade-2-RL-data/{IF-RL,multi-domain-RL,SWE-RL,MOPD}/train.jsonl
    AceReason-Math.jsonl, HelpSteer3.jsonl

Written, below --data: prompts/DOMAIN/{train,held_out}.jsonl, and prompts/DOMAIN/mopd.jsonl with the rows of the
released MOPD set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("prepare_data")

Row = Mapping[str, Any]

RELEASED = "Nemotron-Cascade-2-RL-data"
POOLS = ("IF-RL", "multi-domain-RL", "SWE-RL")


def domain_of(row: Row) -> str | None:
    """The domain of a released row by its verifier fields; None for a row that nothing can verify."""
    if row.get("instruction_id_list"):
        return "instruction_following"
    if row.get("schema_str"):
        return "structured_outputs"
    if row.get("options") and row.get("expected_answer"):
        return "stem_mcqa"
    if row.get("environment_name") == "workbench" and row.get("ground_truth"):
        return "workplace_assistant"
    if row.get("instance_id"):
        return "swe_agentic"
    return "math" if row.get("expected_answer") else None


def prompt_key(row: Row) -> str:
    """A hash of the prompt, whichever of the usual fields holds it. Raises KeyError when none does."""
    asked = row.get("responses_create_params") or {}
    prompt = asked.get("input") or row.get("prompt") or row.get("problem_statement")
    if not prompt:
        raise KeyError("the row has no prompt (responses_create_params.input, prompt or problem_statement)")
    if isinstance(prompt, list):
        prompt = [[message.get("role"), message.get("content")] for message in prompt]
    return hashlib.sha256(json.dumps(prompt, ensure_ascii=False).encode()).hexdigest()


def math_row(row: Row) -> Row:
    """A problem of AceReason-Math as a prompt of the environment `math`."""
    request = "Please reason step by step, and put your final answer within \\boxed{}."
    return {"prompt": f"{row['problem']}\n\n{request}", "answer": row["answer"]}


def chat_row(row: Row) -> Row:
    """A conversation of HelpSteer3 as a prompt of the environment `genrm`, with the answer that people preferred."""
    preferred = (
        "response1" if row["overall_preference"] <= 0 else "response2"
    )  # -3: the first far better, 3: the second
    prompt = [{"role": message["role"], "content": message["content"]} for message in row["context"]]
    return {"prompt": prompt, "reference": row[preferred]}


class Prompts:
    """Rows by domain, each with its prompt's hash and its line as it is written."""

    def __init__(self) -> None:
        self.lines: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.unverifiable: Counter[str] = Counter()

    def add_released(self, file: Path) -> None:
        """Raises SystemExit, naming the line, for a row without a prompt."""
        for where, line, row in read(file):
            domain = domain_of(row)
            if domain is None:
                self.unverifiable[str(file)] += 1
                continue
            try:
                self.lines[domain].append((prompt_key(row), line))
            except KeyError as error:
                raise SystemExit(f"{where}: {error.args[0]}") from None

    def add_rewritten(self, file: Path, domain: str, rewrite: Callable[[Row], Row]) -> None:
        """Raises SystemExit, naming the line, for a row that lacks what is rewritten."""
        for where, _, row in read(file):
            try:
                prompt = rewrite(row)
            except KeyError as error:
                raise SystemExit(f"{where}: the row has no field {error}") from None
            self.lines[domain].append((prompt_key(prompt), json.dumps(prompt, ensure_ascii=False)))


def read(file: Path) -> Iterator[tuple[str, str, Row]]:
    """Place, line and content of each row."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file}:{number}", line.strip(), json.loads(line)


def held_out_keys(keys: Iterable[str], count: int) -> set[str]:
    """The prompts with the smallest hashes: at most `count`, and at most a tenth of all."""
    distinct = sorted(set(keys))
    return set(distinct[: min(count, len(distinct) // 10)])


def write(file: Path, lines: Iterable[str]) -> int:
    """Write lines aside, then in place. Returns their number; with none there is no file."""
    rows = list(lines)
    if rows:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".writing")
        aside.write_text("".join(f"{line}\n" for line in rows), encoding="utf-8")
        aside.replace(file)
    return len(rows)


def prepare(data: Path, held_out: int) -> None:
    """Read what lies below `data` and write its prompts by domain."""
    pools, distilled = Prompts(), Prompts()
    for pool in POOLS:
        _add(data / RELEASED / pool / "train.jsonl", pools.add_released)
    _add(data / "AceReason-Math.jsonl", lambda file: pools.add_rewritten(file, "math", math_row))
    _add(data / "HelpSteer3.jsonl", lambda file: pools.add_rewritten(file, "chat", chat_row))
    _add(data / RELEASED / "MOPD" / "train.jsonl", distilled.add_released)
    for file, count in (pools.unverifiable + distilled.unverifiable).items():
        logger.info("%s: left out %d rows without anything to verify an answer by", file, count)
    for domain in sorted(pools.lines.keys() | distilled.lines.keys()):
        rows, folder = pools.lines[domain], data / "prompts" / domain
        kept = held_out_keys((key for key, _ in rows), held_out)
        train = write(folder / "train.jsonl", (line for key, line in rows if key not in kept))
        measured = write(folder / "held_out.jsonl", {key: line for key, line in rows if key in kept}.values())
        mopd = write(folder / "mopd.jsonl", (line for key, line in distilled.lines[domain] if key not in kept))
        logger.info("%s: %d to train on, %d held out, %d of the MOPD set", folder, train, measured, mopd)


def _add(file: Path, take: Callable[[Path], None]) -> None:
    if file.is_file():
        take(file)
    else:
        logger.info("%s: not there, left out", file)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the downloads")
    parser.add_argument("--held-out", type=int, default=256, help="prompts of each domain to hold out, at most")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not options.data.is_dir():
        raise SystemExit(f"--data: the folder {options.data} does not exist")
    prepare(options.data, options.held_out)


if __name__ == "__main__":
    main()
