"""User buffers are Transformer Engine's: what it is asked for, and what is said where it is not there."""

import enum
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_checkpoints import write_checkpoint

from millrace.config.model_shape import ModelShape
from millrace.config.schema import ParallelConfig, TrainerConfig
from millrace.megatron import user_buffers
from millrace.megatron.model_config import transformer_config
from millrace.megatron.topology import LayoutError

PARALLEL = ParallelConfig(tp=2, sequence_parallel=True)
TRAINER = TrainerConfig(overlap_tensor_parallel=True, max_tokens_per_micro_batch=96)


class Mode(enum.Enum):
    NONE = "none"
    FP8 = "fp8"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return ModelShape.from_hf(write_checkpoint("qwen3", tmp_path_factory.mktemp("dense")))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What Transformer Engine is asked for, in a process without buffers."""
    asked: list[dict[str, Any]] = []
    engine = SimpleNamespace(initialize_ub=lambda **named: asked.append(named), UserBufferQuantizationMode=Mode)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", engine)
    user_buffers.allocate.cache_clear()
    yield asked
    user_buffers.allocate.cache_clear()


def test_the_buffers_hold_one_full_micro_batch_and_are_allocated_once(
    calls: list[dict[str, Any]], dense: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_buffers, "uses_transformer_engine", lambda *of: True)
    for _ in range(2):  # a policy and its frozen twin
        user_buffers.prepare(dense, PARALLEL, TRAINER, torch.bfloat16, torch.device("cuda"))
    shape = {"shape": [96, dense.hidden_size], "tp_size": 2}
    assert calls == [{**shape, "ub_cfgs": {}, "bootstrap_backend": "nccl", "quantization_modes": [Mode.NONE]}]


def test_older_engines_are_asked_in_their_own_words(calls: list[dict[str, Any]]) -> None:
    del sys.modules["transformer_engine.pytorch.module.base"].UserBufferQuantizationMode
    user_buffers.allocate(64, 32, 4)
    assert calls == [{"shape": [64, 32], "tp_size": 4, "ub_cfgs": {}, "bootstrap_backend": "nccl", "use_fp8": False}]


def test_without_the_switch_nothing_is_allocated(calls: list[dict[str, Any]], dense: ModelShape) -> None:
    user_buffers.prepare(dense, PARALLEL, TrainerConfig(), torch.bfloat16, torch.device("cuda"))
    assert calls == []


def test_layers_that_are_not_the_engines_are_refused(calls: list[dict[str, Any]], dense: ModelShape) -> None:
    with pytest.raises(LayoutError, match="the layers are not Transformer Engine's"):
        user_buffers.prepare(dense, PARALLEL, TRAINER, torch.bfloat16, torch.device("cpu"))
    assert calls == []


@pytest.mark.parametrize("overlap", [False, True])
def test_the_layers_are_told(overlap: bool, dense: ModelShape) -> None:
    trainer = TrainerConfig(overlap_tensor_parallel=overlap)
    config = transformer_config(dense, PARALLEL, trainer, torch.bfloat16, torch.device("cpu"))
    assert config.tp_comm_overlap is overlap and config.sequence_parallel
