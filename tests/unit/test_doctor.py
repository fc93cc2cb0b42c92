import importlib
import sys
from pathlib import Path

import pytest

from millrace import doctor


def test_this_machine_can_run_the_laptop_path_and_every_line_says_what_its_absence_costs() -> None:
    findings = doctor.examine()
    assert doctor.usable(findings), [f for f in findings if f.needed and f.state != "usable"]
    assert all(f.cost for f in findings)
    assert {"Python", "torch", "Megatron-Core", "vLLM", "Slurm", "bubblewrap"} <= {f.name for f in findings}
    assert doctor.table(findings).row_count == len(findings)


def test_the_unrelated_package_named_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    importlib.invalidate_caches()
    finding = doctor._apex()
    assert finding.state == "broken" and "unrelated" in finding.found


def test_something_needed_that_is_broken_makes_the_laptop_path_unusable() -> None:
    sound = doctor.Finding("a", "usable", "1", "all", needed=True)
    assert doctor.usable([sound, doctor.Finding("b", "absent", "", "little")])
    assert not doctor.usable([sound, doctor.Finding("c", "broken", "", "all", needed=True)])
