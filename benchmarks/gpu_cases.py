"""What `benchmarks.gpu` measures: its cases, each of which is one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.gpu_models import Family
from millrace.config.schema import Fp8Recipe, PrecisionConfig

Row = dict[str, Any]

FAMILIES: tuple[Family, ...] = ("dense", "moe", "hybrid")
SHORT, LONG = (4096, 8192), (16384, 32768)
TINY_SHORT, TINY_LONG = (64, 128), (256,)


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    kind: Literal["rate", "train", "overhead"]
    device: Literal["cpu", "cuda"]
    family: Family = "dense"
    fp8: Fp8Recipe = "none"
    lengths: tuple[int, ...] = ()
    """Longest sequence of each row; all are packed into micro-batches of the last."""
    micro_batches: int = 4
    """Of a step."""
    profile: bool = False
    tiny: bool = False

    @property
    def capacity(self) -> int:
        return max(self.lengths)

    @property
    def precision(self) -> PrecisionConfig:
        return PrecisionConfig(fp8=self.fp8, emulate=self.fp8 != "none" and self.device == "cpu")


def cases(device: Any, fp8: Fp8Recipe, tiny: bool, profile: bool) -> Iterator[Case]:
    """The most telling first: what comes last is left out when time runs short."""
    short, long = (TINY_SHORT, TINY_LONG) if tiny else (SHORT, LONG)
    settings: dict[str, Any] = {"device": device, "tiny": tiny}
    yield Case(name="rate", kind="rate", **settings)
    for family in FAMILIES:
        name = f"{family} bf16"
        yield Case(name=name, kind="train", family=family, lengths=short, profile=profile, **settings)
    yield Case(name="dense fp8", kind="train", fp8=fp8, lengths=short, profile=profile, **settings)
    yield Case(name="overhead", kind="overhead", lengths=short[:1], **settings)
    yield Case(name="dense bf16 long", kind="train", lengths=long, micro_batches=2, **settings)
    for family in FAMILIES[1:]:
        yield Case(name=f"{family} fp8", kind="train", family=family, fp8=fp8, lengths=short, **settings)
    yield Case(name="dense fp8 long", kind="train", fp8=fp8, lengths=long[-1:], micro_batches=2, **settings)
    for family in FAMILIES[1:]:
        name = f"{family} bf16 long"
        yield Case(name=name, kind="train", family=family, lengths=long[-1:], micro_batches=2, **settings)
