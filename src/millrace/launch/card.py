"""`millrace verify card`: every verification of a checkpoint, one after the other, and the card that records them.

The checks are those of `millrace verify roundtrip` and its like, on ranks of this machine, at the layouts that fit the
model; this module chooses the layouts and puts the results together. It imports no torch.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from millrace.config.errors import ConfigError
from millrace.config.model_shape import ModelShape
from millrace.config.rules import layout_problems
from millrace.config.schema import ParallelConfig, TrainerConfig
from millrace.errors import MillraceError
from millrace.files import replace_text
from millrace.launch.local import STOPPED, RankFailed, run_ranks, trainer_environment
from millrace.launch.run_dir import versions
from millrace.ports import free_port

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp2": {"tp": 2, "sequence_parallel": True},
    "tp2 etp2": {"tp": 2, "etp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
    "ep2": {"dp": 2, "ep": 2},
    "tp2 pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "tp2 pp2 ep2": {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True},
}
"""What is tried, where it fits the model: each way to cut it, then mixes."""

_OWN_FACTS = frozenset({"command", "verdict", "summary", "model", "layout", "seconds", "versions", "logits"})


@dataclass(frozen=True)
class Check:
    """One verification and what came of it."""

    name: str
    """roundtrip, logits, layout or sync."""
    layout: str
    passed: bool
    summary: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        own = asdict(self) | {"seconds": round(self.seconds, 1), "verdict": "passed" if self.passed else "failed"}
        facts = own.pop("facts")
        del own["passed"]
        return own | facts


def fitting_layouts(shape: ModelShape) -> dict[str, ParallelConfig]:
    """The layouts of LAYOUTS that can hold the model, each kind once."""
    layouts = {name: ParallelConfig(**sizes) for name, sizes in LAYOUTS.items()}
    if shape.mamba is not None:  # whose ranks share sequences through Transformer Engine only
        layouts = {name: parallel for name, parallel in layouts.items() if parallel.cp == 1}
    return {name: parallel for name, parallel in layouts.items() if not any(layout_problems(parallel, shape))}


class Interrupted(MillraceError):
    """The user wants no more checks."""


@dataclass(frozen=True)
class Step:
    """A check that is going to run."""

    name: str
    layout: str
    parallel: ParallelConfig

    def card(self, folder: Path) -> Path:
        return folder / f"{self.name}-{self.layout.replace(' ', '-')}.yaml"


def planned_steps(shape: ModelShape, *, sync: bool, only: Sequence[str] = ()) -> list[Step]:
    """The checks in the order in which they run: those of one rank, of two, of four, and the swap of weights.

    `only` names the layouts that are wanted, all that fit when empty. Raises ConfigError for one that does not fit.
    """
    layouts = fitting_layouts(shape)
    if unfit := [name for name in only if name not in layouts]:
        raise ConfigError(f"--layout {unfit[0]!r} does not fit this model; those that do are {', '.join(layouts)}")
    layouts = {name: parallel for name, parallel in layouts.items() if name in only or not only}
    steps = [Step("logits", "one rank", ParallelConfig())]
    for name, parallel in sorted(layouts.items(), key=lambda item: item[1].world_size):
        steps.append(Step("roundtrip", name, parallel))
        if parallel.world_size > 1:
            steps.append(Step("layout", name, parallel))
    return steps + ([Step("sync", "one rank", ParallelConfig())] if sync else [])


def verify_all(hf: Path, *, sync: bool, only: Sequence[str], say: Callable[[str], None]) -> list[Check]:
    """Run the checks of a checkpoint, all of them also when one fails; `say` hears of their progress.

    Raises ConfigError for a model that is not built.
    """
    steps = planned_steps(ModelShape.from_hf(hf), sync=sync, only=only)
    titles = {step: f"{number}/{len(steps)} {step.name} at {step.layout}" for number, step in enumerate(steps, 1)}
    with tempfile.TemporaryDirectory(prefix="millrace-") as name:
        folder = Path(name)
        if any(step.name == "layout" for step in steps):
            say("what one rank computes, for the layouts to be compared with")
            _compute_reference(hf, _reference(folder))
        found = []
        for world in sorted({step.parallel.world_size for step in steps}):
            together = [step for step in steps if step.parallel.world_size == world and step.name != "sync"]
            found += _verify_together(hf, together, titles, folder)
        for step in steps:
            if step.name == "sync":
                say(titles[step])
                found.append(_verify_sync(hf, step, folder))
    return found


def _reference(folder: Path) -> Path:
    return folder / "one-rank.safetensors"


def _compute_reference(hf: Path, reference: Path) -> None:
    step = {"title": "", "arguments": ["layout-reference", "--hf", str(hf), "--reference", str(reference)]}
    if words := _run_steps([step], 1, reference.parent):
        raise MillraceError(f"one rank could not compute what layouts are compared with: {words}")


def _verify_together(hf: Path, steps: Sequence[Step], titles: Mapping[Step, str], folder: Path) -> list[Check]:
    """Run steps of as many ranks in one set of them; after an error the steps behind it get ranks of their own."""
    found, left = [], list(steps)
    while left:
        described = [{"title": titles[step], "arguments": _arguments(hf, step, folder)} for step in left]
        words = _run_steps(described, left[0].parallel.world_size, folder)
        while left and left[0].card(folder).exists():
            found.append(_read(left.pop(0), folder))
        if left:
            step = left.pop(0)
            found.append(Check(step.name, step.layout, False, words or "wrote no result", 0.0))
    return found


def _verify_sync(hf: Path, step: Step, folder: Path) -> Check:
    arguments = ["--hf", str(hf), "--card", str(step.card(folder)), *_sizes(step.parallel)]
    started = time.monotonic()
    words = _run("cascade.verify_sync", arguments, 1, folder)
    if step.card(folder).exists():
        return _read(step, folder)
    return Check(step.name, step.layout, False, words or "wrote no result", time.monotonic() - started)


def _arguments(hf: Path, step: Step, folder: Path) -> list[str]:
    arguments = [step.name, "--hf", str(hf), "--card", str(step.card(folder)), *_sizes(step.parallel)]
    return arguments + (["--reference", str(_reference(folder))] if step.name == "layout" else [])


def _sizes(p: ParallelConfig) -> list[str]:
    sizes = {"tp": p.tp, "pp": p.pp, "cp": p.cp, "ep": p.ep, "etp": p.etp, "dp": p.dp}
    return [text for key, size in sizes.items() for text in (f"--{key}", str(size))]


def _read(step: Step, folder: Path) -> Check:
    facts = yaml.safe_load(step.card(folder).read_text(encoding="utf-8"))
    own = {key: value for key, value in facts.items() if key not in _OWN_FACTS}
    if "logits" in facts:  # of the layout's check, beside its gradients
        own = {f"logits_{key}": value for key, value in facts["logits"].items()} | own
    return Check(step.name, step.layout, facts["verdict"] == "passed", facts["summary"], facts["seconds"], own)


def _run_steps(steps: Sequence[dict[str, Any]], ranks: int, folder: Path) -> str | None:
    file = folder / "steps.json"
    file.write_text(json.dumps([step | {"port": free_port()} for step in steps]), encoding="utf-8")
    return _run("megatron.verify_steps", [str(file)], ranks, folder)


def _run(module: str, arguments: Sequence[str], ranks: int, folder: Path) -> str | None:
    """Run a module as ranks; what the first one that failed wrote last, None when none did."""
    logs = Path(tempfile.mkdtemp(dir=folder))
    try:
        code = run_ranks(f"millrace.{module}", arguments, ranks, trainer_environment(TrainerConfig(), ranks), logs)
    except RankFailed:
        return _last_words(logs)
    if code == STOPPED:
        raise Interrupted("stopped on request; no card was written")
    return None


def _last_words(logs: Path) -> str:
    """The last line that a failed rank wrote, which is its error; the logs themselves are not kept."""
    for log in sorted(logs.glob("rank-*.log")):
        if lines := log.read_text(encoding="utf-8", errors="replace").strip().splitlines():
            return f"{log.stem}: {lines[-1]}"
    return "a rank ended without a word"


# ---- the card


def card_command(hf: Path, sync: bool, only: Sequence[str]) -> str:
    """The command that makes a card anew."""
    words = ["millrace", "verify", "card", "--hf", str(hf)]
    words += [word for name in only for word in ("--layout", name)] + ([] if sync else ["--no-sync"])
    return shlex.join(words)


def write_card(card: Path, hf: Path, checks: Sequence[Check], command: str) -> None:
    """Write the record of all checks as YAML."""
    shape = ModelShape.from_hf(hf)
    facts = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: number for name, number in versions().items() if name != "platform"},
        "model": hf.name,
        "family": shape.family,
        "parameters": shape.parameter_count(),
        "stored as": shape.torch_dtype,
        "verdict": "passed" if all(check.passed for check in checks) else "failed",
        "seconds": round(sum(check.seconds for check in checks), 1),
        "checks": [check.record() for check in checks],
    }
    replace_text(card, yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=120))


def vllm_is_there() -> bool:
    return importlib.util.find_spec("vllm") is not None
