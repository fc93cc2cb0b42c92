"""Where metrics go besides metrics.jsonl, as the recipe asks: TensorBoard, Weights & Biases, MLflow.

A resumed run goes on in the same run of a tracker: its id is kept in RUN_DIR/trackers.json, with where it is kept, so
that a recipe that names another place begins a new one there. Packages are imported only where they are asked for;
`millrace check` says when one is missing.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from millrace.config.loading import written
from millrace.config.schema import MlflowConfig, Recipe, WandbConfig
from millrace.errors import MillraceError
from millrace.files import replace_text

log = logging.getLogger("millrace")


class TrackerError(MillraceError):
    """A tracker cannot be opened."""


class Tracker(Protocol):
    keeps: bool
    """Whether it still has the steps that a resumed run repeats."""

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Record the metrics of a step as STAGE/METRIC."""

    def close(self) -> None: ...


def open_trackers(recipe: Recipe, run_dir: Path, first_step: int) -> list[Tracker]:
    """The trackers that the recipe asks for. Raises TrackerError for one that cannot be opened."""
    observe, trackers = recipe.observe, list[Tracker]()
    if observe.tensorboard:
        trackers.append(TensorBoardTracker(run_dir, first_step))
    if observe.wandb:
        trackers.append(WandbTracker(observe.wandb, recipe, run_dir))
    if observe.mlflow:
        trackers.append(MlflowTracker(observe.mlflow, recipe, run_dir))
    return trackers


class TensorBoardTracker:
    """Event files in RUN_DIR/tensorboard; steps at or after `first_step` are purged at the start."""

    keeps = False

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        self._board.close()


class WandbTracker:
    """A run of Weights & Biases over the metric `update`: a rewound run goes back, which W&B's own step never does."""

    keeps = True

    def __init__(self, config: WandbConfig, recipe: Recipe, run_dir: Path) -> None:
        import wandb

        place = f"{config.entity or ''}/{config.project}"
        known = _run_id(run_dir, "wandb", place)
        run_id = known or uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=config.mode,
                id=run_id,
                # Offline there is no server to ask; both parts carry one id and `wandb sync` puts them together.
                resume="allow" if config.mode == "online" else None,
                name=recipe.name,
                dir=str(run_dir),
                config=written(recipe),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise TrackerError(
                f"observe.wandb: the run cannot be opened ({error}); log in with `wandb login`, set "
                "observe.wandb.mode=offline, or leave observe.wandb out"
            ) from error
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")
        _remember(run_dir, "wandb", place, run_id)

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        self._run.log({"update": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow. A server that stops answering costs its curves, not the run: that is said once."""

    keeps = True

    def __init__(self, config: MlflowConfig, recipe: Recipe, run_dir: Path) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._failure, self._lost = MlflowException, False
        place = f"{config.tracking_uri} {config.experiment}"
        try:
            self._client = MlflowClient(tracking_uri=config.tracking_uri)
            self._id = _run_id(run_dir, "mlflow", place) or self._new_run(config, recipe)
            self._client.update_run(self._id, status="RUNNING")
        except MlflowException as error:
            raise TrackerError(
                f"observe.mlflow: {config.tracking_uri} cannot be used ({error}); correct observe.mlflow.tracking_uri, "
                "start that server, or leave observe.mlflow out"
            ) from error
        _remember(run_dir, "mlflow", place, self._id)

    def _new_run(self, config: MlflowConfig, recipe: Recipe) -> str:
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(config.experiment)
        run_id = self._client.create_run(experiment, run_name=recipe.name).info.run_id
        self._client.log_dict(run_id, written(recipe), "recipe.json")
        return run_id

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        metrics = [Metric(f"{stage}/{name}", value, now, step) for name, value in values.items()]
        self._tell(lambda: self._client.log_batch(self._id, metrics=metrics))

    def close(self) -> None:
        self._tell(lambda: self._client.set_terminated(self._id))

    def _tell(self, what: Any) -> None:
        if self._lost:
            return
        try:
            what()
        except self._failure as error:
            self._lost = True
            log.warning(f"MLflow does not answer and gets no more metrics; metrics.jsonl has them all ({error})")


def _run_id(run_dir: Path, tracker: str, place: str) -> str | None:
    """The id under which an earlier part of the run was tracked at that place."""
    known = _ids(run_dir).get(tracker, {})
    return known["id"] if known.get("place") == place else None


def _remember(run_dir: Path, tracker: str, place: str, run_id: str) -> None:
    ids = {**_ids(run_dir), tracker: {"place": place, "id": run_id}}
    replace_text(run_dir / "trackers.json", json.dumps(ids, indent=2) + "\n")


def _ids(run_dir: Path) -> dict[str, dict[str, str]]:
    file = run_dir / "trackers.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
