"""What `benchmarks.gpu` prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_cases import Row
from millrace.planning.assumed import GIB

HEAD = (
    "",
    "precision",
    "layers",
    "packed",
    "tokens/s",
    "MFU",
    "log-prob tokens/s",
    "peak GiB",
    "plan GiB",
    "recompute",
)
MFU_AIMS = {"dense": 0.45, "moe": 0.30}
FP8_AIM, OVERHEAD_AIM, MEMORY_AIM = 1.3, 1.02, 0.05


def utilisation(rows: Sequence[Row], row: Row) -> float | None:
    """Of the rate that was measured in bfloat16; None where that is missing."""
    rate = next((r["rate bf16"] for r in rows if "rate bf16" in r), None)
    return row["flops_s"] / rate if rate else None


def rates_text(whole: dict[str, Any]) -> str:
    rates: Row = next((row for row in whole["rows"] if "rate bf16" in row), {})
    shown = [f"{name} {rates[f'rate {name}'] / 1e12:.3g}" for name in ("bf16", "fp8") if rates.get(f"rate {name}")]
    measured = f"{', '.join(shown)} TFLOP/s in one product" if shown else "the rate of its products was not measured"
    return f"{whole['device']}: {measured}; {whole['seconds']} s in all"


def table_text(rows: Sequence[Row]) -> str:
    """The rows of training in columns, then a line for each problem and for each profile."""
    lines = [HEAD, *(_columns(rows, row) for row in rows if "tokens_s" in row)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for row in rows:
        if "problem" in row:
            text.append(f"{row['case']}: {row['problem']}")
        elif "costs" in row:
            text.append(f"{row['case']}: " + ", ".join(f"{name} {share:.0%}" for name, share in row["costs"]))
        elif "overhead" in row:
            low, high = row["overhead_quartiles"]
            text.append(
                f"Policy.train_step over bare Megatron-Core, {row['model']}: {row['overhead']:.3f} "
                f"({low:.3f} to {high:.3f}); losses differ by {row['losses_apart']:.1e}"
            )
    return "\n".join(text)


def _columns(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    used = utilisation(rows, row)
    apart = row["peak_bytes"] / row["planned_bytes"] - 1
    return (
        row["model"],
        row["precision"],
        row["layers"],
        str(row["packed"]),
        f"{row['tokens_s']:.0f}",
        "" if used is None else f"{used:.1%}",
        f"{row['logprob_tokens_s']:.0f}",
        f"{row['peak_bytes'] / GIB:.1f} ({apart:+.0%})",
        f"{row['planned_bytes'] / GIB:.1f}",
        row["recompute"],
    )


def aims_text(rows: Sequence[Row]) -> str:
    """Which aims are met."""
    trained = [row for row in rows if "tokens_s" in row]
    lines = []
    for family, aim in MFU_AIMS.items():
        used = [utilisation(rows, r) or 0.0 for r in trained if r["case"].startswith(f"{family} bf16")]
        if used:
            lines.append(_aim(f"MFU of {family} in bfloat16", max(used), aim, f"{max(used):.1%}", f">= {aim:.0%}"))
    for family in MFU_AIMS:
        best = {p: [r["tokens_s"] for r in trained if r["case"] == f"{family} {p}"] for p in ("bf16", "fp8")}
        if best["bf16"] and best["fp8"]:
            faster = max(best["fp8"]) / max(best["bf16"])
            lines.append(_aim(f"FP8 over bfloat16, {family}", faster, FP8_AIM, f"{faster:.2f}x", f">= {FP8_AIM}x"))
    for row in rows:
        if "overhead" in row:
            over = row["overhead"]
            lines.append(_aim("overhead", -over, -OVERHEAD_AIM, f"{over:.3f}x", f"<= {OVERHEAD_AIM}x"))
    if trained:
        worst = max(abs(row["peak_bytes"] / row["planned_bytes"] - 1) for row in trained)
        lines.append(_aim("plan's memory", -worst, -MEMORY_AIM, f"off by {worst:.0%} at most", f"<= {MEMORY_AIM:.0%}"))
    return "\n".join(lines)


def _aim(what: str, found: float, least: float, shown: str, bound: str) -> str:
    return f"{what}: {shown}, aim {bound}: {'met' if found >= least else 'missed'}"
