"""Tiny git repositories with real bugs and tests, and the rows of swe_agentic over them.

    python recipes/laptop/make_repositories.py FOLDER [--seed 0] [--each 2]

FOLDER/repositories/NAME are git repositories of two commits: one with a bug and tests that do not see it, and the one
that mends it and brings the tests that do. FOLDER/train.jsonl and FOLDER/held_out.jsonl are rows as SWE-bench has them,
one for each repository; which tests fail before and pass after is what running them gave. FOLDER/agentless/ has
the same issues as rows of swe_agentless, with the file at fault and its test. The standard library and git.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COMMAND = "python3 -m unittest -v"
LINE = re.compile(r"^(\w+) \(([\w.]+)\)(?:\n[^\n]*?)? \.\.\. (ok|FAIL|ERROR)", re.MULTILINE)
GIT = ("-c", "user.name=author", "-c", "user.email=author@localhost", "-c", "init.defaultBranch=main")
DATES = {f"GIT_{who}_DATE": "2024-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")}


@dataclass(frozen=True)
class Bug:
    """NAME and NUMBER in the texts are drawn for each repository."""

    kind: str
    issue: str
    code: str
    wrong: str
    """What of the mended code was otherwise, and how."""
    right: str
    tests: str
    new_tests: str


BUGS = (
    Bug(
        "intervals",
        "merge() leaves intervals apart that touch: merge([(1, NUMBER), (NUMBER, 99)]) gives two intervals, and one is "
        "expected.",
        '''
def merge(intervals):
    """Overlapping and touching intervals as one, sorted."""
    merged = []
    for start, end in sorted(intervals):
        if merged and start RIGHT merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
''',
        "<",
        "<=",
        """
    def test_apart(self):
        self.assertEqual(merge([(200, 300), (1, NUMBER)]), [(1, NUMBER), (200, 300)])

    def test_overlapping(self):
        self.assertEqual(merge([(1, NUMBER), (2, 99)]), [(1, 99)])
""",
        """
    def test_touching(self):
        self.assertEqual(merge([(1, NUMBER), (NUMBER, 99)]), [(1, 99)])

    def test_touching_chain(self):
        self.assertEqual(merge([(NUMBER, 90), (90, 99), (1, NUMBER)]), [(1, 99)])
""",
    ),
    Bug(
        "cache",
        "A Cache of NUMBER entries drops an entry that was just read. Reading an entry should make it the newest; the "
        "one that was used least recently goes first.",
        '''
class Cache:
    """The last entries that were used."""

    def __init__(self, size=NUMBER):
        self.size, self.entries = size, {}

    def put(self, key, value):
        self.entries.pop(key, None)
        self.entries[key] = value
        while len(self.entries) > self.size:
            del self.entries[next(iter(self.entries))]

    def get(self, key):
        if key not in self.entries:
            return None
        RIGHT
''',
        "return self.entries[key]",
        "self.entries[key] = value = self.entries.pop(key)\n        return value",
        """
    def test_bounded(self):
        cache = Cache()
        for key in range(NUMBER + 3):
            cache.put(key, -key)
        self.assertEqual(len(cache.entries), NUMBER)
        self.assertIsNone(cache.get(0))

    def test_kept(self):
        cache = Cache(1)
        cache.put("a", 1)
        self.assertEqual(cache.get("a"), 1)
""",
        """
    def test_reading_renews(self):
        cache = Cache(2)
        cache.put("a", 1)
        cache.put("b", 2)
        cache.get("a")
        cache.put("c", 3)
        self.assertEqual((cache.get("a"), cache.get("b"), cache.get("c")), (1, None, 3))
""",
    ),
    Bug(
        "slugs",
        "slug('NAME  --  NUMBER!') gives 'NAME-----NUMBER-'. Runs of characters that are no letters or digits should "
        "become one hyphen, and none should stand at the ends.",
        '''
import re


def slug(title):
    """A title as part of an address."""
    return RIGHT
''',
        're.sub("[^a-z0-9]", "-", title.lower())',
        're.sub("[^a-z0-9]+", "-", title.lower()).strip("-")',
        """
    def test_lower(self):
        self.assertEqual(slug("NAME NUMBER"), "NAME-NUMBER")
""",
        """
    def test_runs(self):
        self.assertEqual(slug("NAME  --  NUMBER"), "NAME-NUMBER")

    def test_ends(self):
        self.assertEqual(slug("(NAME)!"), "NAME")
""",
    ),
    Bug(
        "durations",
        "show(3600 * NUMBER) gives 'NUMBER h 0 min 0 s'; parts that are zero should be left out, and 0 is '0 s'.",
        '''
UNITS = (("h", 3600), ("min", 60), ("s", 1))


def show(seconds):
    """A duration in words."""
    parts = []
    for unit, size in UNITS:
        count, seconds = divmod(seconds, size)
        RIGHT
    return " ".join(parts) or "0 s"
''',
        'if count or parts or unit == "s":\n            parts.append(f"{count} {unit}")',
        'if count:\n            parts.append(f"{count} {unit}")',
        """
    def test_all_parts(self):
        self.assertEqual(show(3600 * NUMBER + 61), "NUMBER h 1 min 1 s")

    def test_nothing(self):
        self.assertEqual(show(0), "0 s")
""",
        """
    def test_hours(self):
        self.assertEqual(show(3600 * NUMBER), "NUMBER h")

    def test_hours_and_seconds(self):
        self.assertEqual(show(3600 * NUMBER + 5), "NUMBER h 5 s")
""",
    ),
)
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "larch", "maple", "north")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=2, help="repositories of each kind of bug; the last is held out")
    arguments = parser.parse_args()
    if (arguments.folder / "repositories").exists():
        parser.error(f"{arguments.folder} holds repositories already; remove it, or name another folder")
    draw = random.Random(arguments.seed)
    rows: dict[str, list[dict[str, object]]] = {"train": [], "held_out": []}
    for bug in BUGS:
        words = draw.sample(WORDS, arguments.each)
        for place, word in enumerate(words):
            last = place == len(words) - 1
            rows["held_out" if last else "train"].append(
                make(bug, word, draw.randint(3, 60), arguments.folder / "repositories")
            )
    (arguments.folder / "agentless").mkdir()
    for name, found in rows.items():
        agentless = [without_execution(row, arguments.folder / "repositories") for row in found]
        for file, written in ((f"{name}.jsonl", found), (f"agentless/{name}.jsonl", agentless)):
            (arguments.folder / file).write_text("".join(json.dumps(row) + "\n" for row in written))
            sys.stdout.write(f"{arguments.folder / file}: {len(written)} rows\n")


def make(bug: Bug, word: str, number: int, folder: Path) -> dict[str, object]:
    """Write a repository and give its row."""
    name = f"{word}-{bug.kind}"
    repository, package = folder / name, word
    (repository / package).mkdir(parents=True)
    (repository / "tests").mkdir()

    def filled(text: str) -> str:
        return text.replace("NAME", word).replace("NUMBER", str(number))

    def write(code: str, tests: str) -> None:
        imported = re.findall(r"^(?:def|class) (\w+)", bug.code, re.MULTILINE)[0]
        head = f"import unittest\n\nfrom {package}.{bug.kind} import {imported}\n\n\n"
        head += f"class Test{bug.kind.title()}(unittest.TestCase):"
        (repository / package / f"{bug.kind}.py").write_text(filled(bug.code.replace("RIGHT", code)).lstrip("\n"))
        (repository / "tests" / f"test_{bug.kind}.py").write_text(head + filled(tests))

    for folder_of_code in (package, "tests"):
        (repository / folder_of_code / "__init__.py").touch()
    (repository / "README.md").write_text(f"# {name}\n\nTests: `{COMMAND}`\n")
    (repository / ".gitignore").write_text("__pycache__/\n")
    git(repository, "init", "--quiet")
    write(bug.wrong, bug.tests)
    base = commit(repository, f"Add {bug.kind}")
    write(bug.wrong, bug.tests + bug.new_tests)
    before = outcomes(repository)
    write(bug.right, bug.tests + bug.new_tests)
    after = outcomes(repository)
    commit(repository, f"Mend {bug.kind}")
    return {
        "instance_id": name,
        "repo": name,
        "base_commit": base,
        "problem_statement": filled(bug.issue),
        "patch": git(repository, "diff", base, "HEAD", "--", package),
        "test_patch": git(repository, "diff", base, "HEAD", "--", "tests"),
        "FAIL_TO_PASS": sorted(test for test in after if after[test] == "ok" and before.get(test) != "ok"),
        "PASS_TO_PASS": sorted(test for test in after if after[test] == "ok" and before.get(test) == "ok"),
        "test_command": COMMAND,
        "test_format": "unittest",
    }


def without_execution(row: dict[str, object], folder: Path) -> dict[str, object]:
    """The row as swe_agentless has it: with the files as they are before the repair."""
    repository, base = folder / str(row["repo"]), row["base_commit"]
    listed = git(repository, "ls-tree", "-r", "--name-only", str(base)).splitlines()
    files = {path: git(repository, "show", f"{base}:{path}") for path in listed if path.endswith(".py")}
    return {
        "instance_id": row["instance_id"],
        "original_prompt": row["problem_statement"],
        "golden_patch": row["patch"],
        "relevant_file_contents": {path: text for path, text in files.items() if text},
    }


def outcomes(repository: Path) -> dict[str, str]:
    """What each test comes to, under its name as Python writes it before 3.11."""
    done = subprocess.run([sys.executable, "-B", *COMMAND.split()[1:]], cwd=repository, capture_output=True, text=True)
    found = LINE.findall(done.stderr)
    return {f"{method} ({place.removesuffix('.' + method)})": outcome for method, place, outcome in found}


def commit(repository: Path, message: str) -> str:
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", message)
    return git(repository, "rev-parse", "HEAD").strip()


def git(repository: Path, *arguments: str) -> str:
    environment = {**os.environ, **DATES, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["git", *GIT, *arguments]
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
