import pytest
import torch
import torch.distributed as dist

from millrace.config.schema import ParallelConfig, TrainerConfig
from millrace.megatron.topology import LayoutError, init_distributed

CPU = TrainerConfig(device="cpu")


@pytest.fixture
def three_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ({"tp": 2, "pp": 2}, "tp 2 x pp 2 x cp 1 x dp 1 = 4 ranks, but 3 started"),
        ({"dp": 3, "ep": 2}, "parallel.ep 2 x parallel.etp 1 does not divide the 3 ranks"),
    ],
)
def test_a_layout_that_does_not_fit_the_ranks_is_refused_before_any_group_exists(
    layout: dict[str, int], sentence: str, three_ranks: None
) -> None:
    with pytest.raises(LayoutError, match=sentence):
        init_distributed(ParallelConfig(**layout), CPU, seed=1)
    assert not dist.is_initialized()


def test_a_rank_that_was_not_started_as_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(LayoutError, match=r"WORLD_SIZE.* not in the environment"):
        init_distributed(ParallelConfig(), CPU, seed=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent_is_refused(three_ranks: None) -> None:
    with pytest.raises(LayoutError, match="no CUDA device"):
        init_distributed(ParallelConfig(dp=3), TrainerConfig(device="cuda"), seed=1)
