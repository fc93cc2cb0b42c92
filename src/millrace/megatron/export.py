"""A policy as a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from millrace.converters.safetensors_io import HFWriter, prepare_export, publish
from millrace.megatron import weights
from millrace.megatron.policy import Policy
from millrace.megatron.worker import bytes_bar, gather, on_rank_zero

SHARD_BYTES = 2 << 30


def export_hf(
    policy: Policy,
    source: str | Path,
    out: Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write `policy` to `out` in Hugging Face format, with tokenizer and configs of `source`. Collective.

    `texts` are files to write besides, by name, in place of those of `source`.

    Every rank writes the tensors it owns into files of its own, so that none holds the model. A folder of that name is
    always complete: it is renamed at the end. Raises ConversionError where `out` exists and is not to be overwritten.
    """
    on_rank_zero(lambda: prepare_export(out, overwrite=overwrite))
    writer = HFWriter(out, max_shard_bytes=max_shard_bytes, rank=policy.topology.rank)
    own_bytes = weights.export_bytes(weights.bind(policy.module, policy.shape, policy.topology))
    with bytes_bar("writing", own_bytes) as advance:
        for name, tensor in policy.hf_tensors():
            writer.add(name, tensor)
            advance(tensor.numel() * tensor.element_size())
    manifests = gather(writer.close())
    on_rank_zero(lambda: publish(out, manifests, source=source, dtype=policy.config.dtype, texts=texts))
    return out
