"""An exact checksum of a tensor's bytes, the same on every device.

The bytes are read as little-endian 64-bit words x. Within a chunk of words the checksum is sum_j w_j x_j with fixed
odd weights w, and chunks are combined by Horner's rule with an odd multiplier, all modulo 2^64; last comes the number
of bytes. An odd weight is invertible modulo 2^64, so that a change of a single word always shows, and words that change
places show because weights differ. Integer sums do not depend on the order in which a device adds: no rounding, no
tolerance. It is no cryptographic hash.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_END_BYTES = 1 << 20
_CHUNK_WORDS = 1 << 19
_MASK = (1 << 64) - 1
_HORNER = 0x9E3779B97F4A7C15
_SPLITMIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def fingerprint(tensor: Tensor) -> int:
    """Order-sensitive checksum in [0, 2^64) of the tensor's bytes in row-major order; shape and dtype do not count.

    Needs 8 MiB beside the tensor (and a copy of it when it is not contiguous).
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    sums = [_weighted_sum(chunk) for chunk in _words(data[:whole]).split(_CHUNK_WORDS) if chunk.numel()]
    if whole < data.numel():
        tail = data.new_zeros(8)
        tail[: data.numel() - whole] = data[whole:]
        sums.append(_weighted_sum(tail.view(torch.int64)))
    state = 0
    for value in torch.stack(sums).tolist() if sums else []:
        state = (state * _HORNER + value) & _MASK
    return (state * _HORNER + data.numel()) & _MASK


def _words(data: Tensor) -> Tensor:
    """View bytes as 64-bit words; bytes that do not start at a multiple of eight are moved first."""
    aligned = data if data.storage_offset() % 8 == 0 else data.clone()
    return aligned.view(torch.int64)


def _weighted_sum(words: Tensor) -> Tensor:
    return (words * _weights(words.device)[: words.numel()]).sum()


@lru_cache
def _weights(device: torch.device) -> Tensor:
    """Odd 64-bit weights: splitmix64's finaliser of the position."""
    x = torch.arange(1, _CHUNK_WORDS + 1, dtype=torch.int64) * _signed(_HORNER)
    x = (x ^ (x >> 30)) * _signed(_SPLITMIX[0])
    x = (x ^ (x >> 27)) * _signed(_SPLITMIX[1])
    return ((x ^ (x >> 31)) | 1).to(device)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def folder_checksum(folder: str | Path) -> str:
    """SHA-256 of what tells the weights of a Hugging Face folder from others: config.json, and of each weight file
    name, size and both ends, its header and weights that any training moves."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for file in sorted(Path(folder).glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        digest.update(_both_ends(file))
    return digest.hexdigest()


def _both_ends(path: Path) -> bytes:
    with path.open("rb") as file:
        first = file.read(_END_BYTES)
        file.seek(max(0, path.stat().st_size - _END_BYTES))
        return first + file.read()
