"""The trained policy as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

from millrace.megatron.policy import Policy
from millrace.stages.control import ControlGroup


def export_policy(policy: Policy, source: str, out: Path, control: ControlGroup) -> None:
    """Write `policy` to `out` in Hugging Face format, with the tokenizer and configs of `source`. Collective."""
    raise SystemExit("wired once the converters' writer is in")
