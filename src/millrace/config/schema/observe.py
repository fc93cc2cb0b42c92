"""Where metrics go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    project: str
    """Project of the run."""
    entity: str | None = None
    """Team or user; the login's own when absent."""
    mode: Literal["online", "offline"] = "online"
    """Send the metrics while the run goes, or keep them in RUN_DIR/wandb for `wandb sync`."""


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    tracking_uri: str
    """Where MLflow keeps runs, such as http://host:5000 or sqlite:///mlflow.db."""
    experiment: str
    """Name of the experiment."""


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    tensorboard: bool = True
    """Write TensorBoard event files to RUN_DIR/tensorboard."""
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases (extra `wandb`)."""
    mlflow: MlflowConfig | None = None
    """Also log to MLflow (extra `mlflow`)."""
