"""The reference of a KL term: the policy as it was at the stage's start, forward only."""

from __future__ import annotations

from millrace.megatron.policy import Policy
from millrace.stages.context import StageContext


def checkpoint_name(stage_index: int, stage_name: str) -> str:
    """Name of the checkpoint kept at the end of a stage."""
    return f"stage-{stage_index:02d}-{stage_name}"


def reference_policy(ctx: StageContext, stage_index: int) -> Policy:
    """A frozen copy of the weights that stage `stage_index` started from."""
    reference = ctx.policy.frozen_twin()
    if stage_index == 0:
        reference.load_hf(ctx.recipe.model.path)
    else:
        name = checkpoint_name(stage_index - 1, ctx.recipe.stages[stage_index - 1].name)
        ctx.checkpointer.load(reference, ctx.checkpointer.store.directory / name)
    return reference
