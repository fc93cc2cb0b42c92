import dataclasses
import json
from pathlib import Path

import pytest
from tiny_checkpoints.families import config_of

from millrace.config.schema import FleetConfig
from millrace.rollout.model_settings import model_settings
from millrace.rollout.server import server_command, server_environment


def folder(path: Path, family: str, **overrides: object) -> str:
    (path / "config.json").write_text(json.dumps(config_of(family, overrides)))
    return str(path)


def command(model_path: str, device: str, **config: object) -> list[str]:
    fleet = dataclasses.replace(FleetConfig(), **config)  # type: ignore[arg-type]
    return server_command(fleet, model_path=model_path, host="127.0.0.1", port=1, device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3_text"])
def test_most_families_ask_for_nothing(tmp_path, family):
    for on_cpu in (True, False):
        settings = model_settings(folder(tmp_path, family), on_cpu=on_cpu)
        assert (settings.arguments, settings.variables) == ((), {})


def test_a_hybrids_state_is_kept_in_float32_on_every_device(tmp_path):
    path = folder(tmp_path, "nemotron_h", hybrid_override_pattern="ME*")
    for device in ("cpu", "cuda"):
        arguments = command(path, device)
        assert arguments[arguments.index("--mamba-ssm-cache-dtype") + 1] == "float32"


def test_a_hybrid_caches_prefixes_on_gpus_only(tmp_path):
    path = folder(tmp_path, "nemotron_h")
    assert "--no-enable-prefix-caching" in command(path, "cpu")
    assert "--no-enable-prefix-caching" not in command(path, "cuda")
    assert "--no-enable-prefix-caching" not in command(folder(tmp_path, "qwen3"), "cpu")


@pytest.mark.parametrize(("latent", "rotary", "disabled"), [(512, 64, False), (512, 32, True), (32, 16, True)])
def test_latent_attention_takes_the_cpu_kernel_at_its_widths_alone(tmp_path, latent, rotary, disabled):
    path = folder(tmp_path, "deepseek_v3", kv_lora_rank=latent, qk_rope_head_dim=rotary)
    for device, expected in (("cpu", disabled), ("cuda", False)):
        environment = server_environment(
            FleetConfig(), model_path=path, inherited={}, token="t", host="127.0.0.1", device=device
        )
        assert (environment.get("VLLM_MLA_DISABLE") == "1") is expected
        # Without AMX too, and whatever the data type: what is verified here is what runs everywhere.
        assert ("CPU_MLA" in command(path, device)) is (device == "cpu" and not disabled)


def test_what_a_recipe_adds_comes_last_and_so_wins(tmp_path):
    arguments = command(folder(tmp_path, "nemotron_h"), "cuda", extra_args=("--mamba-ssm-cache-dtype", "bfloat16"))
    assert arguments[-2:] == ["--mamba-ssm-cache-dtype", "bfloat16"]


@pytest.mark.parametrize("text", ["[]", "no JSON", None])
def test_a_folder_that_says_nothing_is_left_to_vllm(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert model_settings(str(tmp_path), on_cpu=True).arguments == ()
