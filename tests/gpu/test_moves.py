"""A checkpoint goes from CPU ranks to a GPU and back, and training goes on as if it had stayed."""

from __future__ import annotations

import pytest
import torch
from device_runs import DEVICES, Found, in_turn
from tiny_checkpoints import write_checkpoint

SETTINGS = {
    "float32": ("float32", False),
    "float32 distributed": ("float32", True),
    "bfloat16": ("bfloat16", False),
    "bfloat16 distributed": ("bfloat16", True),
}
"""Data type, distributed optimizer."""


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def found(device: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """Two steps on the CPU, saved; two more there, and two more on the device, saved; two more on the CPU from
    there."""
    root = tmp_path_factory.mktemp("moves")
    model = str(write_checkpoint("qwen3_moe", root / "model", num_hidden_layers=2))
    at_home, away, back = {}, {}, {}
    for name, (dtype, distributed) in SETTINGS.items():
        job = {"kind": "trained", "model": model, "dtype": dtype, "distributed": distributed, "steps": 2}
        first, second = str(root / name / "cpu"), str(root / name / "device")
        at_home |= {f"{name} first": {**job, "save": first}, f"{name} stayed": {**job, "load": first, "steps": 4}}
        if name == "float32":
            at_home[f"{name} forgot"] = {**job, "load": first, "forget": True}
        away |= {
            f"{name} away": {**job, "load": first, "save": second},
            f"{name} present": {**job, "load": first},
            f"{name} offloaded": {**job, "load": first, "save": f"{second} offloaded", "offload": True},
            f"{name} offloaded on": {**job, "load": f"{second} offloaded", "offload": True},
            f"{name} present on": {**job, "load": second},
        }
        back[f"{name} back"] = {**job, "load": second}
    return in_turn(root / "runs", [("cpu", at_home), (device, away), ("cpu", back)])


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_goes_on_across_devices_with_its_moments(setting: str, found: dict[str, Found]) -> None:
    stayed, away, back = (found[f"{setting} {where}"] for where in ("stayed", "away", "back"))
    exact = setting.startswith("float32")
    assert (found[f"{setting} first"]["step"], away["step"], back["step"]) == (2, 4, 6)
    moved = [*away["losses"], *back["losses"]]
    assert moved == pytest.approx(stayed["losses"], rel=1e-4 if exact else 0.1, abs=1e-5 if exact else 0.02)
    apart = (back["logits"] - stayed["logits"]).abs()
    assert float(apart.max() if exact else apart.mean()) <= (2e-3 if exact else 0.15)


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_optimizer_that_waits_in_host_memory_makes_the_same_updates(setting: str, found: dict[str, Found]) -> None:
    """Also through a checkpoint that is written and read while it waits."""
    for present, offloaded in (("present", "offloaded"), ("present on", "offloaded on")):
        one, other = found[f"{setting} {present}"], found[f"{setting} {offloaded}"]
        assert one["losses"] == other["losses"] and torch.equal(one["logits"], other["logits"])
        assert one["offloaded"] == 0
        # Two moments of float32, and with bfloat16 the master weights.
        assert other["offloaded"] > 7 * one["logits"].numel()


def test_moments_that_are_lost_would_show(found: dict[str, Found]) -> None:
    stayed, forgot = (found[f"float32 {how}"]["losses"] for how in ("stayed", "forgot"))
    assert forgot[0] == pytest.approx(stayed[0], rel=1e-4)
    assert abs(forgot[1] - stayed[1]) > 10 * 1e-4 * abs(stayed[1])
