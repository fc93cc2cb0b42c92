"""What the ledger says about where a stage came from and what it cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.checkpoint_store import MANIFEST
from millrace.config.schema import Recipe, SamplingStage, SftStage, StageConfig
from millrace.converters.fingerprint import folder_checksum
from millrace.observe.writer import read_metrics
from millrace.stages.sources import WeightSource

_READ_BYTES = 4 << 20


def origin_facts(source: WeightSource) -> dict[str, str]:
    """Label, place and checksum of the weights that a stage starts from."""
    return {"parent": source.label, "parent_checkpoint": source.folder.name, "parent_checksum": checksum(source)}


def checksum(source: WeightSource) -> str:
    """SHA-256 of what tells these weights apart: the manifest of a checkpoint, which holds the checksum of every file;
    of a Hugging Face folder its config.json and of each weight file name, size and both ends."""
    if source.checkpoint:
        return hashlib.sha256((source.folder / MANIFEST).read_bytes()).hexdigest()
    return folder_checksum(source.folder)


def input_facts(stage: StageConfig, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every data file that a stage trains on."""
    files = list(stage.data) if isinstance(stage, SftStage) else []
    if isinstance(stage, SamplingStage):
        files += [recipe.domains[domain].train for domain in stage.domains]
    return {file: {"bytes": Path(file).stat().st_size, "sha256": _sha256(Path(file))} for file in files}


def changed_inputs(stage: StageConfig, recipe: Recipe, begun: Mapping[str, Any]) -> str | None:
    """Which data file is not what it was when the stage began (its ledger entry), in a sentence; None when all are."""
    for file, facts in input_facts(stage, recipe).items():
        if file in begun["inputs"] and begun["inputs"][file] != facts:
            return (
                f"{file} was changed since stage {stage.name} began, so that going on would train on other rows; put "
                f"the old file back, or run the stage again by --from {stage.name}"
            )
    return None


def built_on(sources: Sequence[WeightSource]) -> str:
    """Tells apart what a stage starts from and is taught by; recorded rollouts hold only for it."""
    return hashlib.sha256("".join(checksum(source) for source in sources).encode()).hexdigest()[:16]


def recorded_versions(run_dir: Path) -> dict[str, str]:
    """The versions of what runs here, as the launcher wrote them into the run's folder."""
    file = run_dir / "versions.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def cost_facts(run_dir: Path, stage: str) -> dict[str, float]:
    """Seconds, tokens and floating-point operations of a stage's steps, from the metrics that were written."""
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["stage"] == stage]
    return {
        "seconds": _total(rows, "time/step"),
        "tokens_trained": _total(rows, "tokens"),
        "tokens_sampled": _total(rows, "tokens/sampled"),
        "flops": _total(rows, "flops"),
    }


def _total(rows: Sequence[dict[str, float]], metric: str) -> float:
    return sum(row.get(metric, 0.0) for row in rows)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
