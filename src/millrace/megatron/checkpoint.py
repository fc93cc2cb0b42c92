"""Checkpoints of a run: save, publish, verify, resume bit for bit.

A checkpoint holds the policy's weights (with LoRA the adapters alone), optimizer state and step, the random states of
every rank, what the run says about its own progress, and the Hugging Face config and tokenizer, so that it can be read
without the run that wrote it.
All ranks call `save` and `load` together; rank 0 alone touches names, manifest and pointer. It reads back at any
parallel layout, with or without a distributed optimizer. Resumed at its own layout, training goes on exactly as if it
had never stopped; at another one the random states cannot be kept and are drawn anew, which a log line says.

Tensors and random states are read as such alone, and torch's pickled metadata is checked for what it names before it is
unpickled. Megatron-Core itself pickles a few small objects besides (all of them since 0.19, else only with Transformer
Engine), so load only what you or people you trust have written.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from millrace.checkpoint_store import (
    FACTS,
    FORMAT,
    HF_FOLDER,
    SHARDS,
    CheckpointError,
    CheckpointStore,
    FileRecord,
    checkpoint_facts,
    comparable,
    file_problem,
    file_record,
    flush_to_disk,
    read_json,
    read_manifest,
    readable_bytes,
    write_json,
    write_manifest,
)
from millrace.converters.fingerprint import folder_checksum
from millrace.converters.safetensors_io import copy_companions
from millrace.megatron.random_state import random_state, reseed, restore_random_state
from millrace.megatron.sharded_state import (
    check_metadata,
    load_module,
    optimizer_step,
    owned_bytes,
    read_sharded,
    sharded_state,
    write_problem,
    write_sharded,
)

if TYPE_CHECKING:
    from millrace.megatron.fp8_emulation import AmaxHistory
    from millrace.megatron.policy import Policy

log = logging.getLogger("millrace")

_RESERVE = "reserve"
AMAX_HISTORY = "fp8-emulation.pt"
"""The history of delayed scales, where FP8 is emulated with them."""
_RESERVE_BYTES = 1 << 20
"""Held while the shards are written, so that the small files written after them always find room."""


class Checkpointer:
    """Saves and loads a Policy in `directory`, of which it keeps the newest `keep` checkpoints."""

    def __init__(self, directory: Path | str, keep: int) -> None:
        """Raises CheckpointError when `keep` is below 1. Touches nothing before the first save or load."""
        self.store = CheckpointStore(Path(directory), keep)
        self._cleaned = False

    def latest(self) -> Path | None:
        """The checkpoint that `load` takes."""
        return self.store.latest()

    def save(
        self,
        policy: Policy,
        step: int,
        state: dict[str, Any],
        *,
        name: str | None = None,
        keep_always: bool = False,
    ) -> Path:
        """Write and publish a checkpoint; collective.

        `state` (JSON) comes back from `load` as it is. `name` replaces `step-00000012`; `keep_always` exempts it from
        retention. Raises CheckpointError on every rank when it cannot be written; what was published before stays.
        """
        policy.gather_parameters()
        with policy.optimizer_present():
            return self._save(policy, step, state, name or f"step-{step:08d}", keep_always)

    def _save(self, policy: Policy, step: int, state: dict[str, Any], name: str, keep_always: bool) -> Path:
        start = time.perf_counter()
        updates = _updates(policy)
        sharded = sharded_state(
            policy.module,
            policy.optimizer if updates else None,
            trained=policy.sharded_adapters(),
            masters=policy.masters,
        )
        size = _sum_over_ranks(owned_bytes(sharded))
        needed = size + size // 50 + 2 * _RESERVE_BYTES
        facts = {**_facts(policy, step, updates), "state": state, "keep_always": keep_always}
        aside = _on_rank_zero(lambda: self._prepare(policy, name, facts, needed))
        try:
            write_sharded(sharded, aside / SHARDS, reserve=aside / _RESERVE)
            _on_rank_zero(lambda: _write_amax_history(policy, aside))
            records = _together(lambda: _finish_rank_files(aside))
            final, retired = _on_rank_zero(lambda: self._publish(aside, name, records))
        except CheckpointError:
            _on_rank_zero(lambda: self.store.give_up(aside, needed))
            raise
        seconds = time.perf_counter() - start
        log.info(
            "checkpoint %s: %s in %.1f s%s",
            final,
            readable_bytes(size),
            seconds,
            f"; removed {', '.join(retired)}" if retired else "",
        )
        return final

    def load(self, policy: Policy, path: Path | str | None = None) -> dict[str, Any] | None:
        """Restore a policy from `path`, or from the checkpoint `latest` names; collective.

        A policy without an optimizer (a reference, a teacher) takes the weights alone and leaves the random states as
        they are. Returns the saved `state`, or None when there is no checkpoint. Raises CheckpointError on every rank
        when a file is missing, truncated or altered, or when the checkpoint is of another model; an older one is never
        taken unasked.
        """
        folder = _on_rank_zero(lambda: self._choose(path))
        if folder is None:
            return None
        facts, manifest = _on_rank_zero(lambda: self._inspect(folder, policy))
        self._verify(folder, manifest)
        _on_rank_zero(lambda: check_metadata(folder / SHARDS))
        policy.gather_parameters()
        with policy.optimizer_present():
            _together(lambda: _take_weights(policy, folder / SHARDS, facts["optimizer_step"]))
        if policy.optimizer is not None:
            policy.step = facts["policy_step"]
            _together(lambda: _take_amax_history(policy, folder))
            self._restore_randomness(policy, folder, facts)
        log.info("loaded %s (step %d)", folder, facts["step"])
        return facts["state"]

    def load_weights(self, policy: Policy, path: Path | str) -> None:
        """Take the weights of a checkpoint and nothing else; collective.

        Step, random states and the optimizer with its master weights stay as they are (but for those of parameters in
        FP8, which are the weights), so a policy that trains on from here needs `reset_optimizer` first. Raises
        CheckpointError like `load`.
        """
        folder = Path(path)
        _, manifest = _on_rank_zero(lambda: self._inspect(folder, policy))
        self._verify(folder, manifest)
        _on_rank_zero(lambda: check_metadata(folder / SHARDS))
        policy.gather_parameters()
        with policy.weights_present():
            _together(lambda: _load_module(policy, folder / SHARDS))

    def _prepare(self, policy: Policy, name: str, facts: dict[str, Any], needed: int) -> Path:
        self._clean_up()
        self.store.directory.mkdir(parents=True, exist_ok=True)
        self.store.require_space(needed)
        aside = self.store.open_aside(name)
        try:
            (aside / SHARDS).mkdir()
            (aside / HF_FOLDER).mkdir()
            copy_companions(Path(policy.config.path), aside / HF_FOLDER)
            write_json(aside / FACTS, {**facts, "sequence": self.store.next_sequence()})
            (aside / _RESERVE).write_bytes(bytes(_RESERVE_BYTES))
        except OSError:
            self.store.give_up(aside, needed)
            raise
        return aside

    def _publish(self, aside: Path, name: str, records: list[dict[str, FileRecord]]) -> tuple[Path, list[str]]:
        written = {file: record for of_rank in records for file, record in of_rank.items()}
        for path in sorted(p for p in aside.rglob("*") if p.is_file()):
            relative = path.relative_to(aside).as_posix()
            if relative not in written:
                flush_to_disk(path)
                written[relative] = file_record(path)
        write_manifest(aside, written)
        return self.store.publish(aside, name), self.store.retire()

    def _choose(self, path: Path | str | None) -> Path | None:
        if path is not None:
            return Path(path)
        self._clean_up()
        return self.store.latest()

    def _clean_up(self) -> None:
        if not self._cleaned:
            for name in self.store.clean_up():
                log.info("cleaned up %s, left behind by a run that was killed", self.store.directory / name)
            self._cleaned = True

    def _inspect(self, folder: Path, policy: Policy) -> tuple[dict[str, Any], dict[str, FileRecord]]:
        try:
            facts, manifest = read_json(folder / FACTS), read_manifest(folder)
        except CheckpointError as damage:
            raise CheckpointError(f"{damage}{self._way_out(folder)}") from None
        if facts["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {facts['format']}; this version reads format {FORMAT}")
        self._require_same_adapters(folder, facts, policy)
        mine = comparable(policy.shape)
        differing = [key for key, value in facts["model"].items() if mine.get(key) != value]
        if differing:
            key = differing[0]
            raise CheckpointError(
                f"{folder} is of another model: {key} is {facts['model'][key]} there and {mine.get(key)} in "
                f"{policy.config.path}"
            )
        return facts, manifest

    def _require_same_adapters(self, folder: Path, facts: dict[str, Any], policy: Policy) -> None:
        """Adapters of other ranks or targets do not fit, nor do those of another base, whose weights are not here."""
        theirs, mine = facts.get("lora"), _lora_facts(policy)
        if theirs is None and mine is None:
            return
        if theirs is None:
            raise CheckpointError(f"{folder} holds all weights, but the policy trains adapters; leave model.lora out")
        if mine is None:
            raise CheckpointError(
                f"{folder} holds adapters alone; `millrace convert adapter` writes them out, and a policy needs "
                "model.lora to load them"
            )
        for key, value in theirs.items():
            if mine[key] != value:
                raise CheckpointError(
                    f"{folder} holds adapters whose {key} is {value}, but the policy's is {mine[key]} "
                    f"(model.lora, with the base {policy.config.path})"
                )

    def _verify(self, folder: Path, manifest: dict[str, FileRecord]) -> None:
        """Each file is read by one rank."""
        mine = list(manifest.items())[dist.get_rank() :: dist.get_world_size()]
        found = _gather([problem for name, record in mine if (problem := file_problem(folder, name, record))])
        problems = [problem for of_rank in found for problem in of_rank]
        if problems:
            more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
            raise CheckpointError(f"{problems[0]}{more}{self._way_out(folder)}")

    def _way_out(self, folder: Path) -> str:
        others = self.store.others(folder)
        if not others:
            return f"; there is no other checkpoint in {self.store.directory}"
        return f"; to resume from {others[0]} instead, write that name into {self.store.directory / 'latest'}"

    def _restore_randomness(self, policy: Policy, folder: Path, facts: dict[str, Any]) -> None:
        if facts["layout"] == _layout(policy):
            restore_random_state(torch.load(folder / _random_file(dist.get_rank()), weights_only=True))
            return
        reseed(policy.seed, facts["step"], dist.get_rank())
        if facts["layout"] is None:
            return
        log.info(
            "%s was written with layout %s; at %s the random states cannot be kept and are drawn anew",
            folder,
            facts["layout"],
            _layout(policy),
        )


def _facts(policy: Policy, step: int, updates: int) -> dict[str, Any]:
    facts = checkpoint_facts(policy.shape, _layout(policy), step=step, policy_step=policy.step, optimizer_step=updates)
    return {
        **facts,
        "lora": _lora_facts(policy),
        "base": str(Path(policy.config.path).resolve()) if policy.config.lora else None,
        "dtype": policy.config.dtype,
    }


def _lora_facts(policy: Policy) -> dict[str, Any] | None:
    """What must be the same for adapters to mean the same; None where all weights are trained."""
    lora = policy.config.lora
    if lora is None:
        return None
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "rslora": lora.rslora,
        "targets": sorted(lora.targets),
        "base": _base_checksum(policy.config.path),
    }


@cache
def _base_checksum(path: str) -> str:
    return folder_checksum(path)


def _updates(policy: Policy) -> int:
    """Updates the optimizer has made; before the first one it has no state to keep. Collective: a rank on which nothing
    is trained, as a pipeline stage may be whose layers have no adapters, counts none."""
    return max(_gather(0 if policy.optimizer is None else optimizer_step(policy.optimizer)))


def _take_weights(policy: Policy, shards: Path, updates: int) -> None:
    """Model, and optimizer state where there is any, from a folder of shards. Collective."""
    moments = policy.optimizer if updates else None
    adapters = policy.sharded_adapters()
    state = sharded_state(policy.module, moments, loading_step=updates, trained=adapters, masters=policy.masters)
    loaded = read_sharded(state, shards)
    _put(policy, loaded["model"])
    if moments is not None:
        moments.load_state_dict(loaded["optimizer"])
    elif policy.optimizer is not None and policy.masters is None:
        policy.optimizer.reload_model_params()
    if policy.masters is not None:
        policy.masters.write()


def _load_module(policy: Policy, shards: Path) -> None:
    adapters = policy.sharded_adapters()
    state = sharded_state(policy.module, None, loading_step=0, trained=adapters, masters=policy.masters)
    _put(policy, read_sharded(state, shards)["model"])
    if policy.masters is not None:
        policy.masters.write()


def _put(policy: Policy, values: dict[str, Any]) -> None:
    """Give the policy loaded weights; adapters stand on the model they were trained on, and parameters in FP8 follow
    their masters when those are written."""
    policy.require_base()
    if policy.masters is None:
        load_module(policy.module, values, part=policy.config.lora is not None)
    else:
        load_module(policy.module, policy.masters.take(policy.module, values), part=True)
        policy.masters.follow()


def _amax_history(policy: Policy) -> AmaxHistory | None:
    return None if policy.emulation is None else policy.emulation.history


def _write_amax_history(policy: Policy, folder: Path) -> None:
    """Every rank has that of the whole model, so one writes it."""
    if (history := _amax_history(policy)) is not None:
        torch.save(history.state(), folder / AMAX_HISTORY)


def _take_amax_history(policy: Policy, folder: Path) -> None:
    history, file = _amax_history(policy), folder / AMAX_HISTORY
    if history is None:
        return
    if not file.exists():
        history.reset()
        log.info("%s holds no history of FP8's delayed scales, which begin afresh", folder)
        return
    try:
        history.restore(torch.load(file, weights_only=True))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; set precision as it was, or another run_dir") from None


def _layout(policy: Policy) -> dict[str, Any]:
    return {**asdict(policy.parallel), "device": policy.topology.device.type}


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def _finish_rank_files(aside: Path) -> dict[str, FileRecord]:
    """Write this rank's random states, and checksum the files it wrote."""
    rank = dist.get_rank()
    own = aside / _random_file(rank)
    with own.open("wb") as file:
        torch.save(random_state(), file)
        file.flush()
        os.fsync(file.fileno())
    written = [own, *(aside / SHARDS).glob(f"__{rank}_*.distcp")]
    return {path.relative_to(aside).as_posix(): file_record(path) for path in written}


def _sum_over_ranks(value: int) -> int:
    return sum(_gather(value))


def _gather(value: Any) -> list[Any]:
    """One value of each rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return work(), None
    except CheckpointError as error:
        return None, str(error)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return None, f"rank {dist.get_rank()} cannot write the checkpoint{where}: {write_problem(error)}"


def _together(work: Callable[[], Any]) -> list[Any]:
    """Do this on each rank; every rank gets all results, or the same CheckpointError."""
    outcomes = _gather(_attempt(work))
    for _, problem in outcomes:
        if problem:
            raise CheckpointError(problem)
    return [result for result, _ in outcomes]


def _on_rank_zero(work: Callable[[], Any]) -> Any:
    """Do this on rank 0; every rank gets the result, or the same CheckpointError."""
    outcome = [_attempt(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome, src=0)
    result, problem = outcome[0]  # type: ignore[misc]
    if problem:
        raise CheckpointError(problem)
    return result
