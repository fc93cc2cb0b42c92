import importlib
from pathlib import Path

import pytest

from millrace import doctor


def test_this_machine_can_run_the_laptop_path_and_every_line_says_what_its_absence_costs() -> None:
    findings = doctor.examine()
    assert doctor.usable(findings), [f for f in findings if f.needed and f.state != "usable"]
    assert all(f.cost for f in findings)
    assert {"Python", "torch", "Megatron-Core", "vLLM", "Slurm", "sandbox", "DeepEP"} <= {f.name for f in findings}
    assert doctor.table(findings).row_count == len(findings)


def test_the_unrelated_package_named_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('cannot import name of pyramid.session')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    finding = doctor._apex()
    assert finding.state == "broken" and "unrelated" in finding.found


@pytest.mark.parametrize(
    ("look", "still_works", "how_to_get_it"),
    [
        ("_transformer_engine", "train on CUDA from plain torch layers", "pip install 'transformer-engine[pytorch]'"),
        ("_apex", "torch's fused kernel", "github.com/NVIDIA/apex"),
        ("_mamba", "by a scan in plain torch", "pip install mamba-ssm causal-conv1d"),
        ("_flash_attention", "take cuDNN's attention", "pip install flash-attn"),
        ("_deep_ep", "travel by all-to-all", "github.com/deepseek-ai/DeepEP"),
    ],
)
def test_what_only_gpus_need_says_what_still_works_and_how_to_get_it(
    look: str, still_works: str, how_to_get_it: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor.util, "find_spec", lambda module: None)
    finding = getattr(doctor, look)()
    assert (finding.state, finding.needed) == ("absent", False)
    assert still_works in finding.cost and how_to_get_it in finding.cost


def test_without_vllm_what_needs_no_samples_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    finding = doctor._vllm()
    assert finding.state == "absent" and finding.needed
    assert "SFT, convert, plan and verify layout work; pip install 'millrace[cpu]'" in finding.cost


def test_without_a_gpu_the_trainer_runs_on_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ask", lambda program: doctor.Answer(["None|0", "imported"], None))
    cuda = next(finding for finding in doctor._torch_and_transformers() if finding.name == "CUDA")
    assert cuda.state == "absent" and "runs on CPU ranks" in cuda.cost and "torch's CUDA build" in cuda.cost


def test_a_package_that_is_there_and_does_not_load_is_broken() -> None:
    finding = doctor._imported("kernels", "torch", "no_such_module_of_kernels", "slower")
    assert finding.state == "broken" and "no_such_module_of_kernels" in finding.found


def test_something_needed_that_is_broken_makes_the_laptop_path_unusable() -> None:
    sound = doctor.Finding("a", "usable", "1", "all", needed=True)
    assert doctor.usable([sound, doctor.Finding("b", "absent", "", "little")])
    assert not doctor.usable([sound, doctor.Finding("c", "broken", "", "all", needed=True)])
