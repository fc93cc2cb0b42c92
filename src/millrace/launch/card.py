"""`millrace verify card`: every verification of a checkpoint, one after the other, and the card that records them.

Each check is the command of its own (`millrace verify roundtrip`, ...), started as ranks on this machine at the layouts
that fit the model; this module chooses the layouts and puts the results together. It imports no torch.
"""

from __future__ import annotations

import importlib.util
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
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
from millrace.launch.local import RankFailed, run_ranks, trainer_environment
from millrace.launch.run_dir import versions

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp2": {"tp": 2, "sequence_parallel": True},
    "tp2 etp2": {"tp": 2, "etp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
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
    return {name: parallel for name, parallel in layouts.items() if not any(layout_problems(parallel, shape))}


def planned_checks(shape: ModelShape, *, sync: bool, only: Sequence[str] = ()) -> list[tuple[str, str, ParallelConfig]]:
    """Check, name of its layout, layout: in the order in which they run, the quickest to fail first.

    `only` names the layouts that are wanted, all that fit when empty. Raises ConfigError for one that does not fit.
    """
    layouts = fitting_layouts(shape)
    if unfit := [name for name in only if name not in layouts]:
        raise ConfigError(f"--layout {unfit[0]!r} does not fit this model; those that do are {', '.join(layouts)}")
    layouts = {name: parallel for name, parallel in layouts.items() if name in only or not only}
    checks = [("roundtrip", name, parallel) for name, parallel in layouts.items()]
    checks.append(("logits", "one rank", ParallelConfig()))
    checks += [("layout", name, parallel) for name, parallel in layouts.items() if parallel.world_size > 1]
    return checks + ([("sync", "one rank", ParallelConfig())] if sync else [])


def verify_all(hf: Path, *, sync: bool, only: Sequence[str], say: Callable[[str], None]) -> list[Check]:
    """Run the checks of a checkpoint, all of them also when one fails; `say` hears of each before it starts.

    Raises ConfigError for a model that is not built.
    """
    planned, found = planned_checks(ModelShape.from_hf(hf), sync=sync, only=only), []
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        reference = Path(folder) / "one-rank.safetensors"
        for number, (name, layout, parallel) in enumerate(planned, start=1):
            say(f"{number}/{len(planned)} {name} at {layout}")
            if name == "layout" and not reference.exists():
                _compute_reference(hf, reference)
            found.append(_check(hf, name, layout, parallel, Path(folder), reference))
    return found


def _compute_reference(hf: Path, reference: Path) -> None:
    """What one rank computes, once for all layouts."""
    arguments = ["layout-reference", "--hf", str(hf), "--reference", str(reference)]
    code = _run("megatron.verify_worker", arguments, ParallelConfig(), reference.parent / "logs-reference")
    if code:
        raise MillraceError(f"one rank could not compute what layouts are compared with (exit code {code})")


def _check(hf: Path, name: str, layout: str, parallel: ParallelConfig, folder: Path, reference: Path) -> Check:
    card = folder / f"{name}-{layout.replace(' ', '-')}.yaml"
    arguments = ["--hf", str(hf), "--card", str(card)]
    module = "cascade.verify_sync"
    if name != "sync":
        module, arguments = "megatron.verify_worker", [name, *arguments]
    if name == "layout":
        arguments += ["--reference", str(reference)]
    started, logs = time.monotonic(), folder / f"logs-{card.stem}"
    try:
        code = _run(module, arguments, parallel, logs)
    except RankFailed:
        return Check(name, layout, False, _last_words(logs), time.monotonic() - started)
    seconds = time.monotonic() - started
    if not card.exists():
        return Check(name, layout, False, f"ended with exit code {code} and wrote no result", seconds)
    facts = yaml.safe_load(card.read_text(encoding="utf-8"))
    own = {key: value for key, value in facts.items() if key not in _OWN_FACTS}
    if "logits" in facts:  # of the layout's check, beside its gradients
        own = {f"logits_{key}": value for key, value in facts["logits"].items()} | own
    return Check(name, layout, code == 0, facts["summary"], seconds, own)


def _last_words(logs: Path) -> str:
    """The last line that a failed rank wrote, which is its error; the logs themselves are not kept."""
    for log in sorted(logs.glob("rank-*.log")):
        if lines := log.read_text(encoding="utf-8", errors="replace").strip().splitlines():
            return f"{log.stem}: {lines[-1]}"
    return "a rank ended without a word"


def _run(module: str, arguments: Sequence[str], p: ParallelConfig, logs: Path) -> int:
    sizes = {"tp": p.tp, "pp": p.pp, "ep": p.ep, "etp": p.etp, "dp": p.dp}
    layout = [text for key, size in sizes.items() for text in (f"--{key}", str(size))]
    environment = trainer_environment(TrainerConfig(), p.world_size)
    return run_ranks(f"millrace.{module}", [*arguments, *layout], p.world_size, environment, logs)


# ---- the card


def card_command(hf: Path, sync: bool, only: Sequence[str]) -> str:
    """The command that makes a card anew."""
    words = ["millrace", "verify", "card", "--hf", str(hf)]
    words += [word for name in only for word in ("--layout", name)] + ([] if sync else ["--no-sync"])
    return shlex.join(words)


def write_card(card: Path, hf: Path, checks: Sequence[Check], command: str) -> None:
    """Write the record of all checks as YAML, aside and then renamed."""
    shape = ModelShape.from_hf(hf)
    facts = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "model": hf.name,
        "family": shape.family,
        "parameters": shape.parameter_count(),
        "stored as": shape.torch_dtype,
        "verdict": "passed" if all(check.passed for check in checks) else "failed",
        "seconds": round(sum(check.seconds for check in checks), 1),
        "checks": [check.record() for check in checks],
    }
    aside = card.with_name(card.name + ".writing")
    aside.write_text(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    aside.rename(card)


def vllm_is_there() -> bool:
    return importlib.util.find_spec("vllm") is not None
