"""How weights reach the engines. `buckets` is the protocol; the other files say where a bucket's bytes live."""

from __future__ import annotations

from pathlib import Path

from millrace.config.schema import FleetConfig
from millrace.rollout.transports.broadcast import BroadcastCarrier
from millrace.rollout.transports.buckets import Carrier
from millrace.rollout.transports.disk import DiskCarrier, disk_folder
from millrace.rollout.transports.ipc import IpcCarrier
from millrace.rollout.transports.shared_memory import SharedMemoryCarrier, shared_memory_folder


def transport_folder(config: FleetConfig, run_dir: Path) -> Path:
    """Where buckets are announced: all trainer ranks and all engines see this folder."""
    return shared_memory_folder(run_dir) if config.transport == "shared_memory" else disk_folder(run_dir)


def make_carrier(config: FleetConfig, folder: Path, rank: int) -> Carrier:
    """The carrier of `config.transport` for the buckets of one rank. Raises SyncError where it cannot work."""
    match config.transport:
        case "shared_memory":
            return SharedMemoryCarrier(folder, rank, config.bucket_bytes)
        case "disk":
            return DiskCarrier(folder, rank, config.bucket_bytes)
        case "nccl" | "gloo":
            return BroadcastCarrier(config.transport, rank, config.bucket_bytes, config.request_timeout_s)
        case "ipc":
            return IpcCarrier(config.bucket_bytes)
