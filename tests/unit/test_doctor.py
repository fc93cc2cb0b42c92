import importlib
import sys
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
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    importlib.invalidate_caches()
    finding = doctor._apex()
    assert finding.state == "broken" and "unrelated" in finding.found


def test_what_only_gpus_need_says_what_still_works_and_how_to_get_it() -> None:
    findings = {look().name: look() for look in (doctor._transformer_engine, doctor._mamba, doctor._flash_attention)}
    assert {name: (f.state, f.needed) for name, f in findings.items()} == dict.fromkeys(
        ("Transformer Engine", "mamba-ssm", "flash-attn"), ("absent", False)
    )
    assert "plain torch layers" in findings["Transformer Engine"].cost
    assert "hybrid models train on CPU ranks" in findings["mamba-ssm"].cost
    assert all("pip install" in finding.cost for finding in findings.values())


def test_a_package_that_is_there_and_does_not_load_is_broken() -> None:
    finding = doctor._imported("kernels", "torch", "no_such_module_of_kernels", "slower")
    assert finding.state == "broken" and "no_such_module_of_kernels" in finding.found


def test_something_needed_that_is_broken_makes_the_laptop_path_unusable() -> None:
    sound = doctor.Finding("a", "usable", "1", "all", needed=True)
    assert doctor.usable([sound, doctor.Finding("b", "absent", "", "little")])
    assert not doctor.usable([sound, doctor.Finding("c", "broken", "", "all", needed=True)])
