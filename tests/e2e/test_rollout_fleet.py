"""Real engines on tiny checkpoints. Two fleets, started together: two engines with a mixture of experts, which are
sampled from, synced, killed and frozen; and one with tied embeddings, which are a trap of their own in a weight swap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch.distributed as dist
from engine_policy import ShareOfPolicy, TransformersPolicy, join_trainer
from tiny_checkpoints import write_checkpoint

from millrace.config.schema import FleetConfig
from millrace.ports import free_port, hold_port, port_of
from millrace.rollout.client import RequestRefused
from millrace.rollout.engine import EngineStartError
from millrace.rollout.fleet import Fleet
from millrace.rollout.fleet_health import State
from millrace.rollout.member import FleetNeedsSync
from millrace.rollout.transports.broadcast import BroadcastCarrier
from millrace.rollout.transports.shared_memory import SharedMemoryCarrier, shared_memory_folder
from millrace.rollout.types import Request, Rollout, SamplingParams
from millrace.rollout.weight_sync import SyncMismatch, WeightSync

ALONE = SimpleNamespace(rank=0, world=1)
NEVER = (319,)
"""A stop token that replaces the model's own and hardly ever comes."""
CONFIG = FleetConfig(
    engines=2,
    dtype="float32",
    max_model_len=512,
    max_num_seqs=16,
    kv_cache_bytes=64 << 20,
    bucket_bytes=256 << 10,
    heartbeat_s=0.5,
    probe_tolerance=1e-4,
)


@dataclass
class Stand:
    fleet: Fleet
    policy: TransformersPolicy
    checkpoints: list[Path]
    run_dir: Path

    def sync(self, **more: Any) -> WeightSync:
        return WeightSync(self.policy, self.fleet, self.fleet.config, ALONE, **more)


@pytest.fixture(scope="module")
def stands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stand]]:
    root = tmp_path_factory.mktemp("fleet")
    layouts: dict[str, tuple[str, bool, int]] = {"experts": ("qwen3_moe", False, 2), "tied": ("qwen3", True, 1)}
    stands: dict[str, Stand] = {}
    try:
        for name, (family, tied, engines) in layouts.items():
            paths = [write_checkpoint(family, root / f"{name}{seed}", seed=seed, tied=tied) for seed in (0, 1, 2)]
            config = dataclasses.replace(CONFIG, engines=engines, sleep="discard" if tied else "never")
            fleet = Fleet(config, str(paths[0]), root / f"run-{name}")
            fleet.start()
            stands[name] = Stand(fleet, TransformersPolicy(paths[0]), paths, root / f"run-{name}")
        for stand in stands.values():
            stand.fleet.wait_ready()
        yield stands
    finally:
        for stand in stands.values():
            stand.fleet.close()


@pytest.fixture
def experts(stands: Mapping[str, Stand]) -> Stand:
    return stands["experts"]


def sampling(**more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "stop_token_ids": NEVER, **more})


def requests(count: int, **more: Any) -> list[Request]:
    return [Request(f"p{n}", (n, 7, 40 + n), sampling(seed=100 * n, **more)) for n in range(count)]


def answers(rollouts: list[list[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[rollout.answer for rollout in group] for group in rollouts]


def wait_until(condition: Callable[[], bool], limit: float) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began


def assert_computes_as(stand: Stand) -> None:
    """The engines' greedy answers and log-probs, sampled and given, are those of the policy's model."""
    stand_fleet, policy = stand.fleet, stand.policy
    for group in stand_fleet.generate(requests(4, temperature=0.0)):
        assert group[0].answer == policy.greedy(group[0].prompt, 12)
    for temperature in (1.0, 0.7):
        for group in stand_fleet.generate(requests(3, temperature=temperature, n=2)):
            for rollout in group:
                expected = policy.sequence_logprobs(rollout.prompt + rollout.answer, temperature)[len(rollout.prompt) :]
                assert max(abs(a - b) for a, b in zip(rollout.rollout_logp, expected, strict=True)) <= 1e-4
    given = [list(range(5, 30)), [3, 1, 4, 1, 5]]
    for tokens, scores in zip(given, stand_fleet.prompt_logprobs(given), strict=True):
        expected = policy.sequence_logprobs(tuple(tokens))
        assert max(abs(a - b) for a, b in zip(scores, expected, strict=True)) <= 1e-4


def test_nothing_is_sampled_before_the_first_sync(experts: Stand) -> None:
    with pytest.raises(FleetNeedsSync):
        experts.fleet.generate(requests(1))


def test_everything_but_health_is_refused_without_the_token(experts: Stand) -> None:
    url = experts.fleet.members[0].client.url
    token = experts.fleet._token
    assert httpx.get(f"{url}/health").status_code == 200
    for path in ("/collective_rpc", "/inference/v1/generate", "/pause", "/v1/completions"):
        assert httpx.post(url + path, json={}).status_code == 401
        assert httpx.post(url + path, json={}, headers={"Authorization": "Bearer x"}).status_code == 401
    for path in ("/metrics", "/docs", "/openapi.json", "/server_info", "/v1/models"):
        assert httpx.get(url + path).status_code == 401
    assert httpx.get(url + "/v1/models", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    pid = experts.fleet.members[0].engine.pid
    assert token not in Path(f"/proc/{pid}/cmdline").read_text()
    assert token not in experts.fleet.members[0].engine.log_path.read_text()


@pytest.mark.parametrize("name", ["experts", "tied"])
@pytest.mark.parametrize("transport", ["shared_memory", "disk"])
def test_after_a_swap_engines_compute_what_transformers_does(
    stands: Mapping[str, Stand], name: str, transport: str
) -> None:
    stand = stands[name]
    config = dataclasses.replace(stand.fleet.config, transport=transport)
    sync = WeightSync(stand.policy, stand.fleet, config, ALONE)
    for version in (1, 2):
        stand.policy.load(stand.checkpoints[version])
        report = sync.push(version)
        assert report.engines == len(stand.fleet.members)
        assert report.probe_max <= 1e-4
        assert report.fingerprints > 0 and report.bytes > 500_000
        assert_computes_as(stand)
        assert {r.weight_version for group in stand.fleet.generate(requests(2)) for r in group} == {version}
    assert not shared_memory_folder(stand.run_dir).exists()
    assert not (stand.run_dir / "weights").exists()


def test_answer_k_depends_on_seed_plus_k_alone(experts: Stand) -> None:
    prompt = (5, 6, 7)
    many = experts.fleet.generate([Request("a", prompt, sampling(n=40, seed=11)), *requests(6, n=4)])[0]
    assert [rollout.index for rollout in many] == list(range(40))
    assert len({rollout.answer for rollout in many}) > 20
    for k in (0, 3, 17, 39):
        alone = experts.fleet.generate([Request("b", prompt, sampling(n=1, seed=11 + k))])[0][0]
        assert alone.answer == many[k].answer
    assert {rollout.engine for group in experts.fleet.generate(requests(8, n=4)) for rollout in group} == {
        member.client.url for member in experts.fleet.members
    }


def test_answers_end_at_stop_tokens_or_at_their_length(experts: Stand) -> None:
    free = experts.fleet.generate([Request("a", (9, 9), sampling(seed=3, max_tokens=8))])[0][0]
    assert (len(free.answer), free.finish_reason) == (8, "length")
    stop = free.answer[4]
    stopped = experts.fleet.generate([Request("a", (9, 9), sampling(seed=3, max_tokens=8, stop_token_ids=(stop,)))])[0][
        0
    ]
    assert stopped.answer == free.answer[: free.answer.index(stop) + 1]
    assert stopped.finish_reason == "stop"
    assert len(stopped.rollout_logp) == len(stopped.answer)


def test_a_prompt_that_is_too_long_is_refused_in_the_engines_words(experts: Stand) -> None:
    with pytest.raises(RequestRefused, match="longer than the maximum model length of 512"):
        experts.fleet.generate([Request("a", (1,) * 600, sampling())])


def test_progress_ends_at_all_answers(experts: Stand) -> None:
    seen: list[tuple[int, int, int]] = []
    experts.fleet.generate(requests(5, n=3), on_progress=lambda *progress: seen.append(progress))
    assert seen[-1] == (15, 15, 15 * 12)
    assert seen == sorted(seen)


@dataclass
class FlipsABit(SharedMemoryCarrier):
    """Shared memory that damages one tensor on the way."""

    victim: str

    def __init__(self, folder: Path, victim: str) -> None:
        super().__init__(folder, 0, CONFIG.bucket_bytes)
        self.victim = victim

    def describe(self, slot, entries):  # type: ignore[no-untyped-def]
        for entry in entries:
            if entry.name == self.victim:
                self.buffer(slot, 1)[entry.offset + 3] ^= 0x40
        return super().describe(slot, entries)


@pytest.mark.parametrize("victim", ["model.layers.2.mlp.experts.1.up_proj.weight", "model.norm.weight"])
def test_a_damaged_bucket_is_caught_with_the_tensors_name_and_its_engine_does_not_serve(
    experts: Stand, victim: str
) -> None:
    broken = experts.sync(carrier=FlipsABit(shared_memory_folder(experts.run_dir), victim))
    with pytest.raises(SyncMismatch, match=f"version 5: {victim} did not arrive"):
        broken.push(5)
    with pytest.raises(FleetNeedsSync):
        experts.fleet.generate(requests(1))
    experts.sync().push(6)
    assert_computes_as(experts)


def test_a_tensor_that_is_left_out_is_caught_with_its_name(experts: Stand) -> None:
    class Forgetful(TransformersPolicy):
        def hf_tensors(self, **kwargs):  # type: ignore[no-untyped-def]
            return (pair for pair in super().hf_tensors() if "layers.1.self_attn.k_proj" not in pair[0])

    policy = Forgetful(experts.checkpoints[1])
    with pytest.raises(SyncMismatch, match=r"not all, for model.layers.1.self_attn.qkv_proj"):
        WeightSync(policy, experts.fleet, experts.fleet.config, ALONE).push(7)
    experts.sync().push(8)
    assert_computes_as(experts)


def test_engines_that_compute_something_else_are_told_from_weights_that_arrived_wrong(experts: Stand) -> None:
    class OtherForward(TransformersPolicy):
        def logprobs(self, batch, *, temperature=1.0):  # type: ignore[no-untyped-def]
            return super().logprobs(batch, temperature=1.5)

    policy = OtherForward(experts.checkpoints[1])
    with pytest.raises(SyncMismatch, match=r"log-probs of the probe prompt differ .* arrived as sent"):
        WeightSync(policy, experts.fleet, experts.fleet.config, ALONE).push(9)


def test_every_trainer_rank_sends_what_it_owns(stands: Mapping[str, Stand]) -> None:
    stand = stands["tied"]
    port = free_port("127.0.0.1")
    script = Path(__file__).with_name("engine_policy.py")
    other = subprocess.Popen(
        [sys.executable, script, stand.checkpoints[0], str(port)], stdout=subprocess.PIPE, text=True
    )
    join_trainer(0, 2, port)
    try:
        config = dataclasses.replace(stand.fleet.config, bucket_bytes=64 << 10, sleep="never")  # as the other rank's
        policy = ShareOfPolicy(stand.checkpoints[0], 0, 2)
        report = WeightSync(policy, stand.fleet, config, SimpleNamespace(rank=0, world=2)).push(11)
    finally:
        dist.destroy_process_group()
    assert other.communicate(timeout=60)[0] == "11"
    stand.policy.load(stand.checkpoints[0])
    assert report.tensors == len(list(stand.policy.hf_tensors()))
    assert_computes_as(stand)


def test_engines_sleep_until_the_next_sync_and_wake_with_its_weights(stands: Mapping[str, Stand]) -> None:
    stand = stands["tied"]
    (member,) = stand.fleet.members
    headers = {"Authorization": f"Bearer {stand.fleet._token}"}

    def sleeping() -> bool:
        return bool(httpx.get(f"{member.client.url}/is_sleeping", headers=headers).json()["is_sleeping"])

    stand.policy.load(stand.checkpoints[1])
    sync = stand.sync()
    sync.push(21)
    assert not sleeping()
    for _ in range(2):  # one that sleeps already is left alone
        sync.let_engines_sleep()
        assert sleeping() and member.client.asleep
    assert sync.version is None, "whoever asks must push again"
    with pytest.raises(FleetNeedsSync):
        stand.fleet.generate(requests(1))
    stand.policy.load(stand.checkpoints[2])
    sync.push(22)
    assert not sleeping() and not member.client.asleep
    assert_computes_as(stand)


def server_processes(group: int) -> list[int]:
    """Processes of an engine's group besides its supervisor."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != group:
            try:
                state, _, pgid = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except FileNotFoundError:
                continue
            if int(pgid) == group and state != "Z":
                found.append(int(entry.name))
    return sorted(found)


def test_a_rollout_survives_a_killed_and_a_frozen_engine(experts: Stand) -> None:
    fleet, sync = experts.fleet, experts.sync()
    experts.policy.load(experts.checkpoints[2])
    sync.push(10)
    asked = requests(48, n=8, max_tokens=160)
    undisturbed = answers(fleet.generate(asked))
    first, second = fleet.members
    groups = [first.engine.pid, second.engine.pid]

    # One engine loses its server process: the other one finishes its prompts too.
    future, progress = fleet.submit(asked)
    wait_until(lambda: progress()[0] > 20, 120)
    os.kill(server_processes(groups[0])[0], signal.SIGKILL)
    assert wait_until(lambda: first.health.state is not State.SERVING, 10) < 3
    assert answers(future.result(60)) == undisturbed
    assert not server_processes(groups[0]), "what the engine had started is gone"

    # The other one falls silent while the first is starting: nobody is left, and the answers so far are kept.
    future, progress = fleet.submit(asked)
    wait_until(lambda: progress()[0] > 20, 120)
    os.killpg(groups[1], signal.SIGSTOP)
    assert wait_until(lambda: second.health.state in (State.DEAD, State.RESTARTING), 10) < 5
    with pytest.raises(FleetNeedsSync):
        future.result(120)
    assert fleet.needs_sync
    report = sync.resync_if_needed()
    assert report is not None and report.version == 10
    assert len(fleet._generation._kept) >= 2
    assert answers(fleet.generate(asked)) == undisturbed
    assert not server_processes(groups[1])
    assert first.health.restarts == 1

    wait_until(lambda: second.health.state is State.STALE, 120)
    report = sync.resync_if_needed()
    assert report is not None and report.engines == 1
    assert {member.health.state for member in fleet.members} == {State.SERVING}
    assert sync.resync_if_needed() is None


def test_an_engine_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    fleet = Fleet(dataclasses.replace(CONFIG, engines=1), str(tmp_path / "nowhere"), tmp_path)
    try:
        fleet.start()
        with pytest.raises(
            EngineStartError, match=r"(?s)engine 0 .* gave up: its process ended with status 1.*nowhere"
        ):
            fleet.wait_ready()
    finally:
        fleet.close()


def test_an_engine_whose_port_another_process_holds_takes_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint("qwen3", tmp_path / "checkpoint")
    with contextlib.ExitStack() as thieves:
        taken: list[int] = []

        def hold_a_port_that_another_listens_on(host: str, port: int | None) -> socket.socket:
            holder = hold_port(host, port)
            if not taken:
                taken.append(port_of(holder))
                thieves.enter_context(socket.create_server((host, taken[0])))
            return holder

        monkeypatch.setattr("millrace.rollout.engine.hold_port", hold_a_port_that_another_listens_on)
        fleet = Fleet(dataclasses.replace(CONFIG, engines=1), str(checkpoint), tmp_path)
        try:
            fleet.start()
            assert fleet.members[0].engine.url.endswith(f":{taken[0]}")
            fleet.wait_ready()
            assert not fleet.members[0].engine.url.endswith(f":{taken[0]}")
            assert fleet.members[0].health.restarts == 0
        finally:
            fleet.close()


class KillsAnEngine(BroadcastCarrier):
    """Broadcasts that an engine does not live to see the end of."""

    def __init__(self, group: int) -> None:
        super().__init__("gloo", 0, CONFIG.bucket_bytes, 15)
        self._victim: int | None = group

    def deliver(self, slot: int, used: int) -> None:
        if self._victim is not None:
            os.killpg(self._victim, signal.SIGKILL)
            self._victim = None
        super().deliver(slot, used)


def test_an_engine_that_dies_in_a_broadcast_takes_no_other_one_with_it(experts: Stand) -> None:
    fleet = experts.fleet
    experts.policy.load(experts.checkpoints[1])
    config = dataclasses.replace(fleet.config, transport="gloo", request_timeout_s=15)
    second = fleet.members[1]
    assert second.engine.pid is not None
    sync = WeightSync(experts.policy, fleet, config, ALONE, carrier=KillsAnEngine(second.engine.pid))
    report = sync.push(31)
    assert report.engines == 1 and fleet.members[0].health.version == 31
    assert second.health.state is not State.SERVING
    assert_computes_as(experts)
