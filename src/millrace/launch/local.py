"""The ranks of a trainer as processes of this machine: all of them, or those of one node of a job.

Ranks are started directly, with the environment torch.distributed reads, and watched from here: one that dies is named
with its log, a stop is passed on once, and nothing outlives this process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from millrace.config.schema import PrecisionConfig, Recipe, TrainerConfig
from millrace.errors import MillraceError
from millrace.ports import free_port

FINISHED, GATED, STOPPED = 0, 3, 130
GRACE_SECONDS = 30.0
"""How long the other ranks may take to end by themselves after one has failed or stopped; rank 0 closes its engines
meanwhile."""
GIVEN_UP_SECONDS = 5.0
"""The same where the ranks of another machine are lost."""

EXPECTED_WARNINGS = (
    "ignore:Transformer Engine and Apex are not installed",
    "ignore:Apex is not installed",
    "ignore:full scope is deprecated",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:`load_state_dict` is deprecated",
    "ignore:Please use DTensor instead",
    "ignore:`sequence_parallel` is set to `True`",
    "ignore::FutureWarning:torch.distributed.c10d_logger",
)
"""What Megatron-Core says at every start on CPU ranks and means nothing there."""

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05
_LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe")
LAST_LINES = 20
_LIBC = ctypes.CDLL(None)


class RankFailed(MillraceError):
    """A rank ended before its work was done.

    lost_peer: it only lost its connection to another rank. last_lines: the end of its log.
    """

    def __init__(self, sentence: str, lost_peer: bool, last_lines: str) -> None:
        super().__init__(sentence)
        self.lost_peer, self.last_lines = lost_peer, last_lines


@dataclass(frozen=True)
class RankGroup:
    """The ranks that one machine has of a trainer."""

    first: int
    count: int
    world: int
    """Ranks of the trainer."""
    address: str
    port: int
    """Where all ranks meet: an address and a port of rank 0's machine."""


def launch(recipe: Recipe, run_dir: Path, until: str | None = None) -> int:
    """Run the trainer of a recipe on this machine until it ends: 0 finished, 3 stopped by a gate, 130 on request.

    Raises RankFailed, naming the rank and its log in RUN_DIR/logs; that is then on record in RUN_DIR/logs/failure.log.
    """
    ranks = recipe.parallel.world_size
    environment = trainer_environment(recipe.trainer, ranks, recipe.precision)
    arguments = [str(run_dir), *([until] if until else [])]
    with failure_on_record(run_dir):
        return run_ranks("millrace.cascade.worker", arguments, ranks, environment, run_dir / "logs")


@contextmanager
def failure_on_record(run_dir: Path) -> Iterator[None]:
    """Write why the ranks failed, with the end of the log, to where `millrace status` looks; a new start removes it."""
    record = failure_log(run_dir)
    record.unlink(missing_ok=True)
    try:
        yield
    except RankFailed as error:
        record.write_text(f"{error}\n{error.last_lines}".rstrip() + "\n", encoding="utf-8")
        way_out = f"{error}; once its cause is mended the same command goes on from what is saved"
        raise RankFailed(way_out, error.lost_peer, error.last_lines) from error


def failure_log(run_dir: Path) -> Path:
    """Why the last start of a run on this machine failed; there is none where it did not."""
    return run_dir / "logs" / "failure.log"


def run_ranks(module: str, arguments: Sequence[str], ranks: int, environment: Mapping[str, str], log_dir: Path) -> int:
    """Run `python -m module arguments` as `ranks` ranks; like `launch`.

    Rank 0 writes to this terminal, its errors to LOG_DIR/rank-0.log as well; the others write to LOG_DIR/rank-N.log.
    """
    group = RankGroup(0, ranks, ranks, "127.0.0.1", free_port())
    return run_group(module, arguments, group, environment, log_dir, grace=GRACE_SECONDS)


def run_group(
    module: str,
    arguments: Sequence[str],
    group: RankGroup,
    environment: Mapping[str, str],
    log_dir: Path,
    *,
    grace: float,
    given_up: Callable[[], bool] = lambda: False,
    on_stop: Callable[[], None] = lambda: None,
) -> int:
    """Like `run_ranks`, for the ranks that this machine has of a trainer.

    grace: seconds that the other ranks have after one failed or stopped. given_up: whether the ranks elsewhere are
    lost, so that those here are ended. on_stop: called when a signal asks the ranks to stop.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    rendezvous = {"WORLD_SIZE": str(group.world), "MASTER_ADDR": group.address, "MASTER_PORT": str(group.port)}
    command = [sys.executable, "-m", module, *arguments]
    watch = _Watch([], grace, given_up, on_stop)
    with watch:
        for local in range(group.count):
            rank = group.first + local
            own = {"RANK": str(rank), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(group.count)}
            full = {**os.environ, **environment, **rendezvous, **own}
            watch.ranks.append(_start(rank, command, full, log_dir / f"rank-{rank}.log"))
        return watch.until_the_end()


def trainer_environment(trainer: TrainerConfig, ranks: int, precision: PrecisionConfig | None = None) -> dict[str, str]:
    """What every rank's environment needs beside its place among the ranks."""
    threads = trainer.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        # Gloo would otherwise listen on whatever address the host name resolves to.
        "GLOO_SOCKET_IFNAME": "lo",
        # The order in which tensor-parallel communication and computation were issued is kept on the GPU.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    if trainer.device == "cpu" or (trainer.device == "auto" and not has_nvidia_device()):
        # Megatron's fused mixture-of-experts functions would be compiled for many seconds at the first step.
        environment["TORCH_COMPILE_DISABLE"] = "1"
        environment["PYTHONWARNINGS"] = ",".join(EXPECTED_WARNINGS)
    if trainer.expandable_segments:
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if trainer.deterministic:
        # Transformer Engine, cuBLAS and NCCL each choose among algorithms by themselves.
        environment["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        environment["NCCL_ALGO"] = "Ring"
    if precision is not None and precision.computes_fp8 and not precision.power_of_two_scales:
        # Read when Transformer Engine is imported; Megatron-Core has no argument for it.
        environment["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "1"
    return environment


def has_nvidia_device() -> bool:
    """Whether the driver shows a GPU; asked without importing torch."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path
    copier: threading.Thread | None
    code: int | None = None

    def look(self) -> None:
        """Take the exit code once the rank has ended, and end what it left behind in its process group."""
        # The group is signalled before the rank is reaped: until then its number cannot belong to anyone else.
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return
        self.kill()
        self.code = self.process.wait()
        if self.copier:
            self.copier.join(timeout=1.0)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)

    def was_interrupted(self) -> bool:
        """Whether a signal ended it, also one that came while Python was still starting."""
        return self.code is not None and (self.code < 0 or _tail(self.log).endswith("KeyboardInterrupt"))

    def ending(self) -> str:
        """How it ended, as a clause."""
        assert self.code is not None
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        name = signal.Signals(-self.code).name
        return f"was ended by {name}" + (" (out of memory?)" if -self.code == signal.SIGKILL else "")


def _start(number: int, command: Sequence[str], environment: Mapping[str, str], log: Path) -> _Rank:
    parent = os.getpid()

    def die_with_the_launcher() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    # A session of its own: Ctrl-C in the terminal reaches this process alone, which passes it on once.
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=None if number == 0 else file,
            stderr=subprocess.PIPE if number == 0 else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_the_launcher,
        )
    copier = None
    if process.stderr is not None:
        copier = threading.Thread(target=_copy, args=(process.stderr, log), daemon=True)
        copier.start()
    return _Rank(number, process, log, copier)


def _copy(source: IO[bytes], log: Path) -> None:
    """Rank 0's errors go to the terminal and to its log."""
    with source, log.open("ab") as file:
        while block := os.read(source.fileno(), 65536):
            file.write(block)
            file.flush()
            os.write(sys.stderr.fileno(), block)


class _Watch:
    """Waits for the ranks, passes signals on to them, and leaves none behind."""

    def __init__(
        self, ranks: list[_Rank], grace: float, given_up: Callable[[], bool], on_stop: Callable[[], None]
    ) -> None:
        self.ranks = ranks
        self.stop_asked = False
        self._grace, self._given_up, self._on_stop = grace, given_up, on_stop
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Watch:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._running():
            rank.kill()
            rank.look()
        for rank in self._running():
            rank.process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def until_the_end(self) -> int:
        failed: list[_Rank] = []
        stopped: list[_Rank] = []
        deadline = float("inf")
        while running := self._running():
            time.sleep(_POLL_SECONDS)
            for rank in running:
                rank.look()
                if rank.code not in (None, FINISHED, GATED, STOPPED):
                    failed.append(rank)
                elif rank.code in (GATED, STOPPED):
                    stopped.append(rank)
            # A rank that stopped before all had found each other is waited for by the others.
            if failed or stopped:
                deadline = min(deadline, time.monotonic() + self._grace)
            if self._given_up():
                deadline = min(deadline, time.monotonic() + GIVEN_UP_SECONDS)
            if time.monotonic() > deadline:
                break
        if failed and not (self.stop_asked and all(rank.was_interrupted() for rank in failed)):
            raise _failure(failed)
        codes = {rank.code for rank in self.ranks}
        agreed = next((code for code in (FINISHED, GATED) if codes == {code}), STOPPED)
        return STOPPED if failed else agreed

    def _running(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.code is None]

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        again = self.stop_asked and number == signal.SIGINT
        self.stop_asked = True
        self._on_stop()
        for rank in self._running():
            os.kill(rank.process.pid, signal.SIGKILL if again else number)


def _failure(failed: Sequence[_Rank]) -> RankFailed:
    """Who failed. A rank that only lost its connection to another is not the cause when there is one that did not."""
    tails = {rank.number: _tail(rank.log) for rank in failed}
    own_fault = [r for r in failed if not any(sign in tails[r.number].lower() for sign in _LOST_PEER)]
    rank = (own_fault or failed)[0]
    lines = tails[rank.number].splitlines()
    said = f", its last line: {lines[-1].strip()}" if lines and rank.number else ""
    sentence = f"rank {rank.number} {rank.ending()}; its log is {rank.log}{said}"
    return RankFailed(sentence, lost_peer=not own_fault, last_lines="\n".join(lines[-LAST_LINES:]))


def _tail(log: Path, size: int = 4096) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return file.read().decode(errors="replace").strip()
