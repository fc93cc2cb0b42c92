"""What labels stand for: `start`, `STAGE` and `STAGE@STEP`, given what a run has been through. Pure."""

from __future__ import annotations

from millrace.cascade.history import History
from millrace.config.graph import START, stage_graph
from millrace.config.schema import EvaluateStage, Recipe
from millrace.stages.sources import checkpoint_name


class Labels:
    def __init__(self, recipe: Recipe, history: History) -> None:
        self._history = history
        self._places = {stage.name: place for place, stage in enumerate(recipe.stages)}
        self._only_evaluate = {stage.name for stage in recipe.stages if isinstance(stage, EvaluateStage)}
        self._parents = stage_graph(recipe.stages).parents

    def origin(self, stage: str) -> str:
        """Label of the weights that a stage starts from."""
        return self.result(self._parents[stage])

    def result(self, stage: str) -> str:
        """Label of the weights that stages start from whose parent is this one: its end, or what its gate went back
        to."""
        return START if stage == START else self.weights(self._history.result(stage))

    def weights(self, label: str) -> str:
        """The label whose own checkpoint holds these weights: a stage that only evaluates has those it was given."""
        return self.origin(label) if label in self._only_evaluate else label

    def checkpoint(self, label: str) -> str | None:
        """Name of the checkpoint that holds a label's weights; None for the model itself."""
        label = self.weights(label)
        if label == START:
            return None
        stage, _, step = label.partition("@")
        return checkpoint_name(self._places[stage], stage, int(step) if step else None)
