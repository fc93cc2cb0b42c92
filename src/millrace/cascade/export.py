"""The trained policy as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from millrace.converters.safetensors_io import HFWriter, Manifest, prepare_export, publish
from millrace.megatron.policy import Policy
from millrace.stages.control import ControlGroup


def export_policy(policy: Policy, source: str, out: Path, control: ControlGroup) -> None:
    """Write `policy` to `out` in Hugging Face format, with the tokenizer and configs of `source`. Collective.

    Every rank writes the tensors it owns into files of its own; a folder of that name is always complete, and one from
    an earlier run is replaced as a whole.
    """
    control.on_main(lambda: prepare_export(out, overwrite=True))
    writer = HFWriter(out, rank=control.rank)
    for name, tensor in policy.hf_tensors():
        writer.add(name, tensor)
    manifests: list[Manifest | None] = [None] * dist.get_world_size()
    dist.all_gather_object(manifests, writer.close())
    control.on_main(
        lambda: publish(out, [manifest for manifest in manifests if manifest], source=source, dtype=policy.config.dtype)
    )
