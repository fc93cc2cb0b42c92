import base64
from pathlib import Path

import pytest
import torch

from millrace.config.schema import FleetConfig
from millrace.rollout.receivers import WorkerReport
from millrace.rollout.transports import make_carrier
from millrace.rollout.transports.arrival import open_handle
from millrace.rollout.transports.buckets import SyncError
from millrace.rollout.transports.groups import rank_offsets
from millrace.rollout.transports.ipc import handle_fields
from millrace.rollout.weight_sync import PROBE_TOKENS, SAMPLE_PERIOD, _mismatch, _sampler

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_every_worker_of_the_fleet_gets_a_rank_of_its_own() -> None:
    workers = [2, 1, 4]
    ranks = [offset + k for offset, count in zip(rank_offsets(workers), workers, strict=True) for k in range(count)]
    assert ranks == [1, 2, 3, 4, 5, 6, 7]


@no_cuda
@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_gpu_transports_are_refused_without_cuda(tmp_path, transport) -> None:
    with pytest.raises(SyncError, match=f"fleet.transport: {transport} needs CUDA.*shared_memory"):
        make_carrier(FleetConfig(transport=transport), tmp_path, 0)


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_memory_that_no_other_process_can_open_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "max_split_size_mb:512,expandable_segments:True")
    with pytest.raises(SyncError, match=rf"expandable segments \({variable}\)"):
        make_carrier(FleetConfig(transport="ipc"), tmp_path, 0)


def test_a_cuda_handle_travels_as_json_and_nothing_of_it_is_pickled() -> None:
    shape = (torch.Tensor, torch.Size((8,)), (1,), 0, torch.UntypedStorage, torch.uint8, 0)
    fields = handle_fields((*shape, b"memory\x00", 8, 16, False, b"counter", 24, b"event", True), "GPU-1")
    assert base64.b64decode(fields["memory"]) == b"memory\x00"
    assert base64.b64decode(fields["counter"]) == b"counter"
    assert base64.b64decode(fields["event"]) == b"event"
    assert (fields["storage_bytes"], fields["storage_offset"], fields["counter_offset"]) == (8, 16, 24)
    assert fields["event_required"] is True


@no_cuda
def test_an_engine_that_does_not_see_the_trainers_gpu_says_so() -> None:
    with pytest.raises(ValueError, match="GPU-1 is not visible"):
        open_handle({"uuid": "GPU-1"}, 8)


def test_every_tensor_is_compared_once_in_a_period_and_an_eighth_each_time() -> None:
    names = [f"model.layers.{n}.mlp.weight" for n in range(400)]
    rounds = [{name for name in names if _sampler(version, False)(name)} for version in range(SAMPLE_PERIOD)]
    assert sum(len(sampled) for sampled in rounds) == len(names)
    assert set().union(*rounds) == set(names)
    assert all(len(sampled) < 100 for sampled in rounds)
    assert all(_sampler(3, True)(name) for name in names)


def verdict(worker: WorkerReport, mean: float = 1e-6) -> str:
    return _mismatch({"a": 1, "b": 2}, {"engine 0": [WorkerReport({"a": 1, "b": 2}), worker]}, {"engine 0": mean}, 1e-3)


def test_a_verdict_names_what_is_wrong_and_where() -> None:
    good = {"a": 1, "b": 2}
    assert verdict(WorkerReport(good)) == ""
    assert "b did not arrive at engine 0" in verdict(WorkerReport({"a": 1, "b": 3}))
    assert "a did not arrive" in verdict(WorkerReport({"b": 2}))
    assert "no values, or not all, for qkv" in verdict(WorkerReport(good, missing=["qkv"]))
    assert "norm arrived right but engine 0 holds other values" in verdict(WorkerReport(good, changed=["norm"]))
    assert "by 0.5 on average" in verdict(WorkerReport(good), mean=0.5)
    assert "what the engine makes of them" in verdict(WorkerReport(good), mean=0.5)
    assert verdict(WorkerReport(good), mean=float("nan")) != ""


def test_the_probe_prompt_is_in_every_vocabulary() -> None:
    assert len(PROBE_TOKENS) == 32
    assert max(PROBE_TOKENS) < 200
    assert len(set(PROBE_TOKENS)) > 16
