"""Where weights of a run come from: a stage's checkpoint, or the Hugging Face checkpoint that the run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.policy import Policy


@dataclass(frozen=True)
class WeightSource:
    label: str
    """What the ledger calls these weights: `start`, a stage, or `STAGE@STEP`."""
    folder: Path
    checkpoint: bool
    """Whether the folder is a checkpoint of the run; else it is a Hugging Face checkpoint."""

    def load_into(self, policy: Policy, checkpointer: Checkpointer) -> None:
        """Give a policy these weights and nothing else; collective. Raises CheckpointError, ConversionError."""
        if self.checkpoint:
            checkpointer.load_weights(policy, self.folder)
        else:
            policy.load_hf(str(self.folder))


def checkpoint_name(stage_index: int, stage_name: str, step: int | None = None) -> str:
    """Name of the checkpoint kept at the end of a stage, or at a step inside it."""
    end = f"stage-{stage_index:02d}-{stage_name}"
    return end if step is None else f"{end}-step-{step:06d}"
