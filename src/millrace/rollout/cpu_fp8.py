"""FP8 engines on CPU: what vLLM's CPU build needs for them, and one kernel that must not run beside them.

vLLM multiplies with FP8 weights on CPU through AMX, and there by blocks only. Its attention in bfloat16 uses AMX too
and relies on tile settings that the FP8 products change between its calls: the engine then ends with an illegal
instruction (vLLM 0.32). `install` lets attention take the AVX-512 kernel instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VARIABLE = "MILLRACE_CPU_FP8"
"""Set for engines on CPU that multiply in FP8."""


def fp8_problem(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Why an engine on this CPU cannot multiply in FP8; None where it can."""
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.is_file() else []
    if "amx_tile" in flags:
        return None
    return (
        "fleet.quantization is fp8, for which engines on CPU need AMX (Intel Sapphire Rapids or newer), and this "
        "CPU has none; set it to none"
    )


def install() -> None:
    """Keep attention away from AMX in this process."""
    from vllm.v1.attention.backends import cpu_attn

    choose = cpu_attn._get_attn_isa

    def without_amx(*arguments: Any, **named: Any) -> str:
        chosen: str = choose(*arguments, **named)
        return "vec" if chosen == "amx" else chosen

    cpu_attn._get_attn_isa = without_amx
