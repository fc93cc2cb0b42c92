"""Containers of Apptainer from the supervisor's side, and the editor that runs in them. A script that starts the
command on this machine stands in for Apptainer."""

import os
import subprocess

import pytest

from millrace.environments.sandbox import workspace
from millrace.environments.sandbox.run import Limits, SandboxFault
from millrace.environments.sandbox.workspace import ApptainerWorkspace
from millrace.environments.swe.editor import edit

LIMITS = Limits(wall_s=5.0, output_bytes=1 << 16)
STANDIN = """#!/bin/bash
if [ -e {0}/broken ]; then echo "FATAL: no container" >&2; exit 255; fi
if [ -e {0}/broken-once ]; then rm {0}/broken-once; echo "FATAL: no container" >&2; exit 255; fi
while [ "$1" != image.sif ]; do shift; done; shift
exec "$@"
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command in the folder of the test; files named broken and broken-once make containers fail."""
    script = tmp_path / "apptainer"
    script.write_text(STANDIN.format(tmp_path))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    container = ApptainerWorkspace()
    return lambda *argv, **options: container.run(tmp_path, argv, LIMITS, image="image.sif", **options)


def test_a_command_in_a_container_ends_as_it_does_anywhere(run):
    assert run("cat", stdin=b"x" * 200_000)[:2] == ("output", 9)
    done = run("sh", "-c", "cat; echo no >&2; exit 3", stdin=b"yes")
    assert (done.ending, done.status, done.stdout, done.stderr) == ("exited", 3, b"yes", b"no\n")
    assert run("sh", "-c", "kill -9 $$")[:2] == ("killed", 9)


def test_a_command_that_never_ends_or_prints_without_end_is_ended(run, tmp_path):
    flood = run("sh", "-c", f"echo $$ > {tmp_path}/pid; exec yes")
    assert flood.ending == "output" and len(flood.stdout) < LIMITS.output_bytes + (1 << 17)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    container, limits = ApptainerWorkspace(), LIMITS._replace(wall_s=0.2)
    assert container.run(tmp_path, ["sh", "-c", "sleep 60 & wait"], limits, image="image.sif").ending == "wall"


@pytest.mark.parametrize("word", ["nul\0", "\ud800", "x" * (1 << 18)], ids=["nul", "surrogate", "too long"])
def test_a_command_that_cannot_be_one_fails_by_itself(run, word):
    done = run("bash", "-c", word)
    assert (done.ending, done.status) == ("exited", 127) and done.stderr


def test_a_container_that_fails_is_told_from_a_command_that_says_so(run, tmp_path):
    done = run("sh", "-c", "echo FATAL >&2; exit 255")
    assert (done.status, done.stderr) == (255, b"FATAL\n")
    (tmp_path / "broken-once").touch()
    assert run("true").clean
    (tmp_path / "broken").touch()
    with pytest.raises(SandboxFault, match="apptainer: FATAL: no container"):
        run("true")


def test_an_image_that_does_not_come_is_not_waited_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "UNPACK_LIMITS", workspace.UNPACK_LIMITS._replace(wall_s=0.2))
    (tmp_path / "apptainer").write_text("#!/bin/bash\nsleep 60")
    with pytest.raises(SandboxFault, match=r"/testbed of image.sif cannot be copied: apptainer: wall with 9"):
        ApptainerWorkspace().unpack("image.sif", tmp_path)


def edited(tmp_path, before, **request):
    """The file behind an edit of it."""
    file = tmp_path / "file"
    file.write_bytes(before)
    edit({"path": str(file), **request})
    return file.read_bytes()


def test_an_edit_changes_what_it_says_and_nothing_else(tmp_path):
    replace = {"action": "replace", "old": "b\n", "text": "x\ny\n"}
    assert edited(tmp_path, b"a\nb\nc", **replace) == b"a\nx\ny\nc"
    assert edited(tmp_path, b"a\r\nb\r\nc\r\n", **replace) == b"a\r\nx\r\ny\r\nc\r\n"
    assert edited(tmp_path, b"a\r\nb\nc\r\n", **replace) == b"a\r\nx\ny\nc\r\n"
    insert = {"action": "insert", "line": 1, "text": "x"}
    assert edited(tmp_path, b"a\nb", **insert) == b"a\nx\nb"
    assert edited(tmp_path, b"a", **insert) == b"a\nx\n"
    assert edited(tmp_path, b"", **{**insert, "line": 0}) == b"x\n"
    assert edited(tmp_path, b"a\r\nb\r\n", **insert) == b"a\r\nx\r\nb\r\n"
    assert edited(tmp_path, b"a\x0cb\nc\n", **insert) == b"a\x0cb\nx\nc\n"


def test_text_that_cannot_be_written_leaves_the_file_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        edited(tmp_path, b"a\n", action="create", text="\ud800")
    assert (tmp_path / "file").read_bytes() == b"a\n"


def test_lines_are_numbered_as_an_interpreter_counts_them(tmp_path):
    (tmp_path / "file.py").write_text("a = 1\x0c\nb = '\u2028'\nc = (\n")
    shown = edit({"action": "view", "path": str(tmp_path / "file.py")})
    assert shown.split("\n")[2] == "     3\tc = ("
    told = subprocess.run(["python3", tmp_path / "file.py"], capture_output=True, text=True).stderr
    assert "line 3" in told
