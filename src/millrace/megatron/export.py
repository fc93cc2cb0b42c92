"""A policy as a Hugging Face checkpoint, and its adapters as a PEFT adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file

from millrace.converters.adapters import ADAPTER_CONFIG, ADAPTER_FILE, write_adapter_config
from millrace.converters.errors import ConversionError
from millrace.converters.safetensors_io import HFReader, HFWriter, prepare_export, publish, put_in_place, unfinished
from millrace.megatron import lora
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
    """Write `policy`, adapters merged, to `out` in Hugging Face format, with tokenizer and configs of `source`.
    Collective.

    `texts` are files to write besides, by name, in place of those of `source`.

    Every rank writes the tensors it owns into files of its own, so that none holds the model. A folder of that name is
    always complete: it is renamed at the end. Raises ConversionError where `out` exists and is not to be overwritten.
    """
    on_rank_zero(lambda: prepare_export(out, overwrite=overwrite))
    writer = HFWriter(out, max_shard_bytes=max_shard_bytes, rank=policy.topology.rank)
    with bytes_bar("writing", policy.owned_bytes()) as advance:
        for name, tensor in policy.hf_tensors():
            writer.add(name, tensor)
            advance(tensor.numel() * tensor.element_size())
    manifests = gather(writer.close())
    on_rank_zero(lambda: publish(out, manifests, source=source, dtype=policy.config.dtype, texts=texts))
    return out


def export_adapter(policy: Policy, base: str | Path, out: Path, *, overwrite: bool = False) -> Path:
    """Write the adapters of `policy` to `out` in PEFT's format, as an adapter of the model in `base`. Collective.

    Ranks write what they own into files of their own, which rank 0 joins: PEFT and vLLM read one file. Raises
    ConversionError where `out` exists and is not to be overwritten, and for a policy without adapters.
    """
    config = policy.config.lora
    if config is None:
        raise ConversionError(f"{policy.config.path} was trained without adapters (model.lora)")
    on_rank_zero(lambda: prepare_export(out, overwrite=overwrite))
    writer = HFWriter(out, rank=policy.topology.rank)
    for name, tensor in policy.adapter_tensors():
        writer.add(name, tensor.clone())
    gather(writer.close())
    entries = lora.entries(policy.shape, config)
    settings = lora.settings(config)
    on_rank_zero(lambda: _publish_adapter(out, lambda folder: write_adapter_config(folder, settings, base, entries)))
    return out


def _publish_adapter(out: Path, write_config: Callable[[Path], None]) -> None:
    """Join the ranks' files, write the config, and rename the folder."""
    folder = unfinished(out)
    written = sorted(folder.glob("*.safetensors"))
    readers = [HFReader(file) for file in written]
    tensors = {name: reader.tensor(name) for reader in readers for name in reader.names}
    if not tensors:
        raise ConversionError(f"no linear of the model has an adapter; {out} would be empty")
    save_file(dict(sorted(tensors.items())), folder / ADAPTER_FILE, metadata={"format": "pt"})
    write_config(folder)
    (folder / ADAPTER_FILE).chmod((folder / ADAPTER_CONFIG).stat().st_mode)  # save_file leaves it to its owner alone
    for file in written:
        file.unlink()
    put_in_place(folder, out)
