import resource
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.config.schema import FleetConfig
from millrace.rollout.auth import TOKEN_VARIABLE
from millrace.rollout.cpu_fp8 import fp8_problem
from millrace.rollout.fleet import Fleet
from millrace.rollout.member import FleetError
from millrace.rollout.placement import Seats
from millrace.rollout.server import Device, server_command, server_environment

INHERITED = {
    "PATH": "/bin",
    "RANK": "3",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "x",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


def command(config: FleetConfig, device: Device = "cpu") -> list[str]:
    return server_command(config, model_path="/models/m", host="127.0.0.1", port=4711, device=device)


def environment(config: FleetConfig, device: Device = "cpu", **more: object) -> dict[str, str]:
    return server_environment(
        config, model_path="/models/m", inherited=INHERITED, token="s3cret", host="127.0.0.1", device=device, **more
    )  # type: ignore[arg-type]


def test_the_token_is_in_the_environment_and_not_on_the_command_line() -> None:
    assert environment(FleetConfig())[TOKEN_VARIABLE] == "s3cret"
    assert not any("s3cret" in argument for argument in command(FleetConfig()))


def test_an_engine_does_not_inherit_the_trainers_rank() -> None:
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & environment(FleetConfig()).keys()
    assert environment(FleetConfig())["PATH"] == "/bin"


def test_an_engine_does_not_use_its_gpu_as_a_trainer_rank_does() -> None:
    inherited = environment(FleetConfig(tensor_parallel=2), "cuda").keys()
    assert not {"CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"} & inherited


@pytest.mark.parametrize("transport", ["shared_memory", "disk", "nccl", "ipc"])
def test_unpickling_from_the_wire_is_never_allowed(transport: str) -> None:
    config = FleetConfig(transport=transport)  # type: ignore[arg-type]
    for device in ("cpu", "cuda"):
        assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment(config, device)


def test_log_probs_are_those_of_the_distribution_that_is_sampled() -> None:
    arguments = command(FleetConfig())
    assert arguments[arguments.index("--logprobs-mode") + 1] == "processed_logprobs"


def test_prompts_on_cpu_are_read_in_one_piece_whatever_their_length() -> None:
    arguments = command(FleetConfig(max_model_len=100_000))
    assert "--no-enable-chunked-prefill" in arguments
    assert int(arguments[arguments.index("--max-num-batched-tokens") + 1]) >= 100_000
    assert "--no-enable-chunked-prefill" not in command(FleetConfig(), "cuda")


def test_an_engine_on_gpus_sees_only_its_own() -> None:
    assert environment(FleetConfig(), "cuda", gpus=["4", "GPU-5"])["CUDA_VISIBLE_DEVICES"] == "4,GPU-5"
    with pytest.raises(FleetError, match="need 4 GPUs, but 3"):
        Fleet(FleetConfig(engines=2, tensor_parallel=2), "m", "runs/x", device="cuda", seats=Seats(["0", "1", "2"]))  # type: ignore[arg-type]


def test_engines_sleep_on_gpus_alone() -> None:
    assert "--enable-sleep-mode" in command(FleetConfig(transport="ipc", sleep="discard"), "cuda")
    assert "--enable-sleep-mode" not in command(FleetConfig(transport="ipc"), "cuda")


def test_fp8_is_quantised_by_blocks_and_keeps_attention_on_cpu_away_from_amx() -> None:
    config = FleetConfig(quantization="fp8")
    for device in ("cpu", "cuda"):
        arguments = command(config, device)
        assert arguments[arguments.index("--quantization") + 1] == "fp8_per_block"
    assert environment(config)["MILLRACE_CPU_FP8"] == "1"
    assert "MILLRACE_CPU_FP8" not in environment(FleetConfig()) | environment(config, "cuda")
    assert "--quantization" not in command(FleetConfig())


def test_a_cpu_without_amx_is_told_so_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu avx512_bf16\n")
    assert "this CPU has none; set it to none" in str(fp8_problem(cpuinfo))
    cpuinfo.write_text("flags : fpu avx512_bf16 amx_bf16 amx_tile\n")
    assert fp8_problem(cpuinfo) is None
    monkeypatch.setattr("millrace.rollout.cpu_fp8.fp8_problem", lambda: "no AMX")
    with pytest.raises(FleetError, match="no AMX"):
        Fleet(FleetConfig(quantization="fp8"), "m", tmp_path, device="cpu").start()


def test_servers_that_already_run_need_their_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(FleetError, match=TOKEN_VARIABLE):
        Fleet(FleetConfig(engines=0, addresses=("http://10.0.0.1:8000",)), "m", "runs/x")  # type: ignore[arg-type]


def test_a_fleet_has_room_for_thousands_of_requests_where_a_process_may_open_1024_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setenv(TOKEN_VARIABLE, "t")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        with Fleet(FleetConfig(engines=0, addresses=("http://127.0.0.1:9",)), "m", tmp_path):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1024
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_fleet_imports_neither_torch_nor_vllm() -> None:
    modules = "fleet, client, engine, server, dispatch, member, fleet_health, types, supervisor, auth"
    check = f"import sys; from millrace.rollout import {modules}; print({{'torch', 'vllm'}} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
