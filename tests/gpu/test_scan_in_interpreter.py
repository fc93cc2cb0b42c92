"""On a GPU with mamba_ssm its kernels take the place of the scan in torch: both compute the same, which Triton's
interpreter shows without one."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from device_runs import alone


@pytest.mark.skipif(
    find_spec("mamba_ssm") is None or find_spec("triton") is None, reason="mamba_ssm or triton is not installed"
)
def test_the_kernels_of_mamba_ssm_compute_what_the_scan_in_torch_does() -> None:
    program = Path(__file__).with_name("interpreted_scan.py")
    done = subprocess.run([sys.executable, str(program)], env=alone(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    apart = json.loads(done.stdout.splitlines()[-1])
    assert set(apart) == {"result", "x", "dt", "A", "B", "C", "D", "dt_bias"}
    assert max(apart.values()) <= 1e-5, apart
