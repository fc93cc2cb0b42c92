import os
import shutil
import socket
import subprocess

import abuse_programs
import pytest
from processes import no_process_left

from millrace.environments.sandbox.boxes import Unavailable
from millrace.environments.sandbox.confine import NOBODY, leaves_root
from millrace.environments.sandbox.tiers import TIERS, NoSandboxError, choose_tier, open_tier


@pytest.fixture(scope="session")
def bubblewrap():
    """bubblewrap from Debian, where it is not there and can be had."""
    if shutil.which("bwrap") or not shutil.which("apt-get") or os.geteuid() != 0:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "bubblewrap"]):
        subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, timeout=120)


@pytest.fixture(scope="session", autouse=True)
def some_tier(bubblewrap):
    """All that is tested here runs in a sandbox."""
    try:
        choose_tier("auto")
    except NoSandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=TIERS)
def each_tier(request, bubblewrap):
    """The name of each tier that this machine can make."""
    try:
        open_tier(request.param).close()
    except Unavailable as error:
        pytest.skip(f"the tier {request.param} is not there: {error}")
    return request.param


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """Things on the host that a program may wish for."""
    folder = tmp_path_factory.mktemp("host")
    for path in (folder, *folder.parents[:3]):
        if str(path).startswith(str(tmp_path_factory.getbasetemp().parent)):
            path.chmod(0o755)
    (folder / "secret").write_text("secret")
    (folder / "writable").write_text("as it was")
    user = {}
    if leaves_root():
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        for path in (folder, folder / "secret", folder / "writable"):
            os.chown(path, NOBODY, NOBODY)
    mode = (folder / "writable").stat().st_mode, (folder / "writable").stat().st_mtime
    victim = subprocess.Popen(["/usr/bin/sleep", "infinity"], start_new_session=True, **user)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"millrace-test-{os.getpid()}"
        abstract.bind("\0" + name)
        abstract.listen()
        yield {
            "secret": str(folder / "secret"),
            "writable": str(folder / "writable"),
            "tests": abuse_programs.__file__,
            "victim": victim.pid,
            "port": server.getsockname()[1],
            "abstract": name,
        }
    killed = victim.poll() is not None
    victim.kill()
    victim.wait()
    assert not killed, "a program killed a process outside"
    assert (folder / "writable").read_text() == "as it was"
    assert mode == ((folder / "writable").stat().st_mode, (folder / "writable").stat().st_mtime)


@pytest.fixture(scope="module")
def box(each_tier, host):
    """A box, which leaves no process behind when it is closed. What other tests start later is none of its own."""
    with no_process_left():
        box = open_tier(each_tier)
        yield box
        box.close()
