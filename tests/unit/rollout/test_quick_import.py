"""A module that is run this way sees what it would see under `python -m`."""

import json
import subprocess
import sys

MODULE = """\
import gc, json, sys
if __name__ == "__main__":
    print(json.dumps([__spec__.name, sys.modules["__main__"].__spec__.name, sys.argv[1:], gc.isenabled()]))
"""


def test_it_is_the_main_module_with_its_arguments_and_garbage_is_collected(tmp_path):
    (tmp_path / "shown.py").write_text(MODULE)
    command = [sys.executable, "-m", "millrace.rollout.quick_import", "shown", "--model", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["shown", "shown", ["--model", "x"], True]
    assert done.stderr == ""
