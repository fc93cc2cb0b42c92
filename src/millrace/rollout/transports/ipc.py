"""Buckets in GPU memory of the trainer rank, which engines on the same GPUs open by CUDA IPC.

The handles travel as base64 fields of the JSON index. vLLM's own plane pickles them, for which a server must unpickle
what comes over the wire (VLLM_ALLOW_INSECURE_SERIALIZATION); that is never allowed here.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from millrace.rollout.transports.buckets import BUCKETS_PER_RANK, Entry, SyncError


def require_cuda(transport: str) -> None:
    """Raises SyncError where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise SyncError(
            f"fleet.transport: {transport} needs CUDA in trainer and engines, and there is no CUDA device here; "
            "use shared_memory (one host) or disk"
        )


class IpcCarrier:
    kind = "ipc"
    few_senders = False

    def __init__(self, bucket_bytes: int) -> None:
        for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            if "expandable_segments:true" in os.environ.get(variable, "").lower():
                raise SyncError(
                    f"fleet.transport: ipc opens memory that expandable segments ({variable}) do not let another "
                    "process open; unset them, or use nccl"
                )
        require_cuda(self.kind)
        self._bucket_bytes = bucket_bytes
        self._buffers: list[Tensor | None] = [None] * BUCKETS_PER_RANK

    def buffer(self, slot: int, size: int) -> Tensor:
        buffer = self._buffers[slot]
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(max(size, self._bucket_bytes), dtype=torch.uint8, device="cuda")
            self._buffers[slot] = buffer
        return buffer

    def describe(self, slot: int, entries: Collection[Entry]) -> Mapping[str, Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        buffer = self._buffers[slot]
        assert buffer is not None
        torch.cuda.current_stream().synchronize()  # the engine reads as soon as it sees the index
        return {
            "handle": handle_fields(reduce_tensor(buffer)[1], str(torch.cuda.get_device_properties(buffer.device).uuid))
        }

    def deliver(self, slot: int, used: int) -> None:
        """Nothing: the engines open the memory."""

    def delivered(self, slot: int) -> bool:
        return True

    def close(self) -> None:
        """Give the memory back to the GPU, whose engines may wait for room for their caches."""
        self._buffers = [None] * BUCKETS_PER_RANK
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def handle_fields(arguments: tuple[Any, ...], uuid: str) -> dict[str, Any]:
    """What torch needs to rebuild a shared CUDA tensor, as JSON.

    arguments: of `rebuild_cuda_tensor`, as `reduce_tensor` gives them. uuid: of the GPU that holds the memory.
    """
    memory, storage_bytes, storage_offset, _, counter, counter_offset, event, event_required = arguments[7:15]
    return {
        "uuid": uuid,
        "memory": base64.b64encode(memory).decode(),
        "storage_bytes": storage_bytes,
        "storage_offset": storage_offset,
        "counter": base64.b64encode(counter).decode(),
        "counter_offset": counter_offset,
        "event": base64.b64encode(event).decode(),
        "event_required": bool(event_required),
    }
