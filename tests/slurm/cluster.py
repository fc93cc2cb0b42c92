"""A real Slurm cluster of four emulated nodes on this machine, with accounting, from Debian's packages.

The nodes are slurmd processes that listen on 127.0.0.11 to 127.0.0.14 and are named after these addresses, which
resolve everywhere. All that the cluster keeps lies in one folder, and its daemons are ended by the pids they wrote
there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

DAEMONS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch")
PACKAGES = ("munge", "mariadb-server-core", "mariadb-client-core", "slurmdbd", "slurmctld", "slurmd", "slurm-client")
PACKAGES += ("libslurm-dev",)
HEADER = Path("/usr/include/slurm/spank.h")
CONTAINER = Path(__file__).with_name("container.c")
NODES = tuple(f"127.0.0.{number}" for number in range(11, 15))
LIMIT = 120.0
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"})
SETTLED_SECONDS = 5.0
"""A job that is put into the queue again is seen as ended for a moment."""

SLURM_CONF = """\
ClusterName=trial
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=5
KillWait=20
MinJobAge=300
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={root}/munge.socket
AccountingStorageEnforce=associations
JobAcctGatherType=jobacct_gather/none
NodeName=127.0.0.[11-14] NodeHostname=localhost NodeAddr=127.0.0.[11-14] Port=[{first}-{last}] CPUs=4 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser={user}
LogFile={root}/slurmdbd.log
PidFile={root}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""
INIT_SQL = """\
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';
"""


class NoCluster(Exception):
    """Why there can be no cluster here."""


def install() -> None:
    """Install Slurm from Debian's packages if it is not there. Raises NoCluster where that cannot be done."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    absent = [name for name in DAEMONS if not shutil.which(name)]
    absent += [] if HEADER.exists() else [str(HEADER)]
    if not absent:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise NoCluster(f"{absent[0]} is not installed, and only root can install it by apt-get; install {PACKAGES}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise NoCluster(f"apt-get {command[0]} failed: {(done.stderr.strip() or 'nothing said').splitlines()[-1]}")


class Cluster:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "slurm.conf"

    # ---- up and down

    def up(self) -> None:
        ports = _free_ports()
        facts = {"root": self.root, "user": _user(), "ctld": ports, "dbd": ports + 1, "sql": ports + 2}
        facts |= {"first": ports + 3, "last": ports + 2 + len(NODES)}
        (self.root / "state").mkdir()
        self.config.write_text(SLURM_CONF.format(**facts))
        (self.root / "slurmdbd.conf").touch(mode=0o600)
        (self.root / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**facts))
        os.environ["SLURM_CONF"] = str(self.config)
        _run("cc", "-shared", "-fPIC", "-o", str(self.root / "container.so"), str(CONTAINER))
        (self.root / "plugstack.conf").write_text(f"required {self.root}/container.so\n")
        self._munge()
        self._database(ports + 2)
        _run("slurmdbd")
        _until(lambda: _tried("sacctmgr", "-n", "list", "cluster"), "slurmdbd")
        _run("sacctmgr", "-i", "add", "cluster", "trial")
        _run("sacctmgr", "-i", "add", "account", "lab", "cluster=trial")
        _run("sacctmgr", "-i", "add", "user", _user(), "account=lab", "cluster=trial")
        _run("slurmctld", "-i", "-f", str(self.config))
        self.bring_back(*NODES)

    def wait_idle(self) -> None:
        """Wait until every node is free."""
        _until(lambda: set(_said("sinfo", "-h", "-p", "main", "-o", "%T").split()) == {"idle"}, "idle nodes")

    def down(self) -> None:
        _tried("scancel", "--user", _user())
        with suppress(AssertionError):  # what does not end is ended with its node
            _until(lambda: not _said("squeue", "-h"), "the queue to be empty", 30.0)
        self.end_daemons()
        self._mariadbd.wait(LIMIT)

    def end_daemons(self) -> None:
        for pattern in ("slurmd-*.pid", "slurmctld.pid", "slurmdbd.pid", "mariadb.pid", "munge.pid"):
            _end(self.root.glob(pattern))

    def _munge(self) -> None:
        secret = self.root / "munge"
        secret.mkdir(mode=0o700)
        (secret / "key").touch(mode=0o600)
        (secret / "key").write_bytes(os.urandom(128))
        files = {"key-file": secret / "key", "pid-file": self.root / "munge.pid", "log-file": secret / "log"}
        files |= {"socket": self.root / "munge.socket", "seed-file": secret / "seed"}
        _run("munged", *(f"--{name}={path}" for name, path in files.items()))

    def _database(self, port: int) -> None:
        data = self.root / "mysql"
        own = ["--no-defaults", f"--user={_user()}", f"--datadir={data}"]
        _run("mariadb-install-db", *own, "--auth-root-authentication-method=normal", "--skip-test-db")
        (self.root / "init.sql").write_text(INIT_SQL)
        more = [f"--socket={self.root}/sql.socket", f"--pid-file={self.root}/mariadb.pid", f"--port={port}"]
        more += ["--bind-address=127.0.0.1", f"--init-file={self.root}/init.sql", "--innodb-buffer-pool-size=32M"]
        more += ["--innodb-flush-log-at-trx-commit=0", "--skip-log-bin", "--innodb-lock-wait-timeout=900"]
        with (self.root / "mariadbd.log").open("wb") as log:
            self._mariadbd = subprocess.Popen(
                ["mariadbd", *own, *more],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _until(lambda: _listens(port), "mariadbd")

    # ---- what tests do to it

    def admit(self, user: str) -> None:
        """Let another user submit jobs."""
        _run("sacctmgr", "-i", "add", "user", user, "account=lab", "cluster=trial")

    def state(self, job: str) -> str:
        """State of a job by squeue, or by sacct when it has left the queue."""
        asked = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True)
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.strip()
        lines = _said("sacct", "-n", "-X", "-P", "-j", job, "-o", "State").split()
        return lines[0] if lines else ""

    def wait_for(self, job: str, states: set[str], limit: float = 480.0) -> str:
        """Wait until a job is in one of the states; fails as soon as it has ended otherwise."""
        ended_since: float | None = None

        def reached() -> bool:
            nonlocal ended_since
            state = self.state(job)
            ended_since = (ended_since or time.monotonic()) if state in ENDED else None
            otherwise = state not in states and ended_since and time.monotonic() - ended_since > SETTLED_SECONDS
            assert not otherwise, f"job {job} was to be {states}, it has ended as {state}"
            return state in states

        _until(reached, f"job {job} to be {states}, it is {self.state(job)}", limit)
        return self.state(job)

    def nodes_of(self, job: str) -> list[str]:
        """The nodes that a job has, in the order of its tasks."""
        return _said("scontrol", "show", "hostnames", _said("squeue", "-h", "-j", job, "-o", "%N").strip()).split()

    def settled(self, job: str) -> str:
        """State of a job when it does not run any more: it may be back in the queue."""
        return self.wait_for(job, {"PENDING", *ENDED})

    def start_now(self, job: str) -> None:
        """Let a job start that was put into the queue again; Slurm would wait two minutes."""
        self.wait_for(job, {"PENDING"}, 60.0)
        time.sleep(3.0)  # the end of the job before must have been settled
        _run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def set_down(self, node: str) -> None:
        """As an operator does it."""
        _run("scontrol", "update", f"nodename={node}", "state=down", "reason=trial")

    def kill_node(self, node: str) -> None:
        """kill -9 of a node's slurmd: Slurm does not hear of the node any more."""
        os.kill(self._slurmd(node), signal.SIGKILL)

    def bring_back(self, *nodes: str) -> None:
        for node in nodes:
            if not _runs(self._slurmd(node)):
                _run("slurmd", "-f", str(self.config), "-N", node)
            _tried("scontrol", "update", f"nodename={node}", "state=resume")  # one that answers is back by itself
        self.wait_idle()

    def clear(self) -> None:
        """End what a test has left, so that the next one finds every node free."""
        _tried("scancel", "--user", _user())
        self.bring_back(*NODES)

    def _slurmd(self, node: str) -> int:
        """Its process id; 0 before it was started."""
        file = self.root / f"slurmd-{node}.pid"
        return int(file.read_text()) if file.exists() else 0


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster that lives as long as the block; raises NoCluster where there can be none."""
    install()
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    root.chmod(0o755)  # munged wants its socket to be reachable by all
    cluster = Cluster(root)
    guard = subprocess.Popen([sys.executable, __file__, str(os.getpid()), str(root)], start_new_session=True)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        guard.kill()
        guard.wait()
        shutil.rmtree(root)


def guard_for(tests: int, root: Path) -> None:
    """End the daemons of a cluster whose tests end without doing it: pytest-xdist kills its processes at Ctrl-C."""
    while _runs(tests):
        time.sleep(1.0)
    Cluster(root).end_daemons()
    shutil.rmtree(root, ignore_errors=True)


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name


def _free_ports(count: int = 10) -> int:
    """The first of some ports in a row that nobody listens on."""
    for first in range(16_000, 19_000, count):
        if not any(_listens(port) for port in range(first, first + count)):
            return first
    raise NoCluster("there are no free ports from 16000 to 19000")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def _tried(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=LIMIT).returncode == 0


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT).stdout


def _until(condition: Callable[[], bool], what: str, limit: float = LIMIT) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"waited {limit:g} s for {what}"
        time.sleep(0.2)


def _end(pid_files: Iterator[Path]) -> None:
    pids = [int(text) for file in pid_files if re.fullmatch(r"\d+", text := file.read_text().strip())]
    for number, limit in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + limit
        while any(_runs(pid) for pid in pids) and time.monotonic() < end:
            time.sleep(0.1)


def _runs(pid: int) -> bool:
    if not pid:
        return False
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    guard_for(int(sys.argv[1]), Path(sys.argv[2]))
