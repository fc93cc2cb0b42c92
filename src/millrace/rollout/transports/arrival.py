"""The engine's end of a transport: from a published index to the tensors of its bucket."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from millrace.rollout.transports.broadcast import BROADCAST
from millrace.rollout.transports.groups import Group, Transfer


class BucketReader:
    """Reads buckets of every transport; `senders` are the groups with trainer ranks, by rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.senders: dict[int, Group] = {}

    def read(self, indexes: Sequence[Path]) -> Iterator[dict[str, Tensor]]:
        """Checkpoint name -> tensor, for one bucket after the other; all that are broadcast are on their way from the
        beginning. Tensors may be views of the sender's memory: copy what outlives the bucket."""
        descriptions = [json.loads(index.read_text()) for index in indexes]
        coming = [self._begin(description) for description in descriptions]
        for index, description, transfer in zip(indexes, descriptions, coming, strict=True):
            if description["kind"] == "disk":
                with safe_open(index.parent / description["file"], framework="pt", device="cpu") as file:
                    yield {entry["name"]: file.get_tensor(entry["name"]) for entry in description["tensors"]}
            else:
                data = self._data(index.parent, description) if transfer is None else transfer.arrived()
                yield {entry["name"]: _view(data, entry) for entry in description["tensors"]}

    def _begin(self, description: Mapping[str, Any]) -> _Coming | None:
        """Begin to take a bucket that is broadcast."""
        if description["kind"] not in BROADCAST:
            return None
        data = torch.empty(description["bytes"], dtype=torch.uint8, device=self._device)
        return _Coming(data, self.senders[description["rank"]].broadcast(data))

    def _data(self, folder: Path, description: Mapping[str, Any]) -> Tensor:
        """uint8: all bytes of a bucket that lies in the sender's memory."""
        size = description["bytes"]
        match description["kind"]:
            case "shared_memory":
                return torch.from_file(str(folder / description["file"]), shared=False, size=size, dtype=torch.uint8)
            case "ipc":
                return open_handle(description["handle"], size)
            case kind:
                raise ValueError(f"this engine knows no transport {kind!r}")


@dataclass(frozen=True)
class _Coming:
    """A bucket on its way."""

    data: Tensor
    transfer: Transfer

    def arrived(self) -> Tensor:
        self.transfer.wait()
        return self.data


def _view(data: Tensor, entry: Mapping[str, Any]) -> Tensor:
    piece = data[entry["offset"] : entry["offset"] + entry["bytes"]]
    return piece.view(getattr(torch, entry["dtype"])).view(entry["shape"])


def open_handle(handle: Mapping[str, Any], size: int) -> Tensor:
    """uint8 [size]: memory of another process' GPU buffer, opened by its CUDA IPC handle as `ipc` describes it."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    if handle["uuid"] not in uuids:
        raise ValueError(
            f"the trainer's GPU {handle['uuid']} is not visible to this engine (it sees {', '.join(uuids) or 'none'}); "
            "start both with the same CUDA_VISIBLE_DEVICES, or use fleet.transport: nccl"
        )
    rebuilt: Tensor = rebuild_cuda_tensor(
        torch.Tensor,
        torch.Size((size,)),
        (1,),
        0,
        torch.UntypedStorage,
        torch.uint8,
        uuids.index(handle["uuid"]),
        base64.b64decode(handle["memory"]),
        handle["storage_bytes"],
        handle["storage_offset"],
        False,
        base64.b64decode(handle["counter"]),
        handle["counter_offset"],
        base64.b64decode(handle["event"]),
        handle["event_required"],
    )
    return rebuilt
