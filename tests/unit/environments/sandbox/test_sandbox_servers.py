"""Programs tested by servers that verify for a job: real ones, on ports of this machine."""

import asyncio
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
from processes import no_process_left

from millrace.config.placement import Placement, VerifierPlace, write_placement
from millrace.environments.sandbox import places, remote
from millrace.environments.sandbox.frames import ask, pack
from millrace.environments.sandbox.remote import RemotePlace, VerifierServer, server_file, servers_of
from millrace.environments.sandbox.run import Limits, Program
from millrace.environments.sandbox.serve import ProgramServer
from millrace.environments.sandbox.service import Case, CodeVerifier, SandboxError
from millrace.environments.sandbox.tiers import NoSandboxError
from millrace.rollout.rendezvous import PLACEMENT, Rendezvous, read_json

LIMITS = Limits(wall_s=20.0, cpu_s=5, memory_bytes=512 << 20)
SLOW_ADD = Program("import time\ntime.sleep(0.2)\nprint(sum(map(int, input().split())))")
SUBTRACT = Program("a, b = map(int, input().split())\nprint(a - b)")
CASES = [Case("1 2", "3"), Case("3 4", "7")]
WRONG = "test 1: wrong output '-1', not '3'"


class Job:
    """A job whose nodes 0, 1, ... verify, with one worker each."""

    def __init__(self, folder, nodes):
        verifiers = tuple(VerifierPlace(node=node, workers=1) for node in range(nodes))
        write_placement(folder / PLACEMENT, Placement(nodes=nodes, trainer=(), servers=(), verifiers=verifiers))
        self.meeting = Rendezvous(folder / "7.0")
        self.meeting.open()
        self.meeting.make_token()
        self.processes = [self.start(node) for node in range(nodes)]

    def start(self, node):
        arguments = [str(self.meeting.folder), str(node), "127.0.0.1", "1"]
        return subprocess.Popen([sys.executable, "-m", "millrace.environments.sandbox.serve", *arguments])

    def again(self, node):
        self.processes[node] = self.start(node)

    def address(self, node):
        said = read_json(server_file(self.meeting, node))
        return said["address"], said["port"]

    def kill(self, node):
        server_file(self.meeting, node).unlink()
        self.processes[node].kill()
        self.processes[node].wait()


@contextmanager
def job(folder, nodes=2):
    with no_process_left():
        running = Job(folder, nodes)
        try:
            yield running
        finally:
            for process in running.processes:
                process.terminate()
            endings = [process.wait(20) for process in running.processes]
    assert set(endings) <= {0, -signal.SIGKILL}, endings


def verified(running, work, **options):
    """What `work` gives with a verifier of a job, and its summary."""

    async def run():
        verifier = CodeVerifier(servers=servers_of(running.meeting), **options)
        try:
            return await work(verifier), verifier
        finally:
            await verifier.close()

    return asyncio.run(run())


async def batch(verifier, pairs=8, meanwhile=lambda done: None):
    """Failures of as many right and wrong programs; `meanwhile` is called when the first is judged."""
    tasks = [asyncio.create_task(verifier.verify(each, CASES, LIMITS)) for each in [SLOW_ADD, SUBTRACT] * pairs]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    meanwhile(tasks)
    return [outcome.failure for outcome in await asyncio.gather(*tasks)]


def test_programs_are_spread_over_servers_and_this_machine_and_the_tier_of_each_is_told(tmp_path):
    with job(tmp_path) as running:
        found, verifier = verified(running, batch)
        assert found == [None, WRONG] * 8
        counts, summary = verifier.statistics, verifier.summary()
        assert sorted(counts.programs_of) == ["node 0", "node 1"] and min(counts.programs_of.values()) >= 4
        tier = verifier.places[0].tier
        assert f"sandbox on node 0 tier {tier}, {counts.programs_of['node 0']} programs; on node 1 tier" in summary
        assert "16 programs, 24 tests, 8 programs passed all; 0 faults of boxes and 0 lost workers" in summary

        found, verifier = verified(running, batch, workers=1)
        assert found == [None, WRONG] * 8
        assert sorted(verifier.statistics.programs_of) == ["node 0", "node 1", "this machine"]


def test_programs_of_a_server_that_is_killed_go_to_the_other(tmp_path):
    with job(tmp_path) as running:
        found, verifier = verified(running, lambda v: batch(v, meanwhile=lambda _: running.kill(1)))
    assert found == [None, WRONG] * 8
    counts = verifier.statistics
    assert counts.programs == 16 and 1 <= counts.lost_workers <= 3, "those it had in hand"
    assert counts.programs_of["node 0"] > counts.programs_of.get("node 1", 0)


def test_a_server_that_comes_back_gets_programs_again(tmp_path):
    def start_anew(_):
        running.kill(0)
        running.again(0)

    with job(tmp_path, nodes=1) as running:
        found, verifier = verified(running, lambda v: batch(v, meanwhile=start_anew))
    assert found == [None, WRONG] * 8
    assert 1 <= verifier.statistics.lost_workers <= 3


def test_a_server_that_stands_still_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BEAT_S", 0.5)
    with job(tmp_path) as running:
        try:
            stop = lambda _: running.processes[1].send_signal(signal.SIGSTOP)  # noqa: E731
            found, verifier = verified(running, lambda v: batch(v, meanwhile=stop))
        finally:
            running.processes[1].send_signal(signal.SIGCONT)
    assert found == [None, WRONG] * 8 and verifier.statistics.lost_workers >= 1


def test_without_any_server_left_there_is_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "ALL_LOST_S", 1.0)
    with (
        job(tmp_path, nodes=1) as running,
        pytest.raises(SandboxError, match=r"node 0 could not be reached for 1 s; see logs/verifier-\*\.log"),
    ):
        verified(running, lambda v: batch(v, meanwhile=lambda _: running.kill(0)))


def test_nobody_is_served_without_the_token(tmp_path):
    with job(tmp_path, nodes=1) as running:
        (server,) = servers_of(running.meeting)
        verified(running, lambda v: batch(v, pairs=1))
        with pytest.raises(NoSandboxError, match="node 0 refuses: the token is not that of its run"):
            CodeVerifier(servers=[VerifierServer("node 0", server.where, "another")])
        for token in (None, "", server.token[:-1]):
            hello = {"token": token, "tier": "unsafe", "compiles": False}
            assert ask(running.address(0), hello, 5.0) == {"refused": "the token is not that of its run"}
        for said in (b"GET / HTTP/1.1\r\n\r\n", pack({"token": "x" * 5000}), b"\0\0\0\2hm", b"\0\0\0\0017"):
            with socket.create_connection(running.address(0), 5.0) as channel:
                channel.sendall(said)
                assert channel.recv(100) == b"", "it hangs up"
        verified(running, lambda v: batch(v, pairs=1))


def test_a_program_that_goes_without_an_answer_is_lost_and_not_waited_for(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")  # no worker can start

    async def verdicts():
        programs = ProgramServer("token", 1)
        server = await asyncio.start_server(programs.connection, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        known = VerifierServer("node 0", lambda: ("127.0.0.1", port), "token")
        place = await asyncio.to_thread(RemotePlace, known, "unsafe", compiles=False)
        ready = asyncio.Event()
        place.open(ready.set)
        try:
            async with asyncio.timeout(20.0):
                await ready.wait()
                return [await place.verify(job, 5.0) for job in ({}, None)]
        finally:
            await place.close()
            server.close()
            await programs.close()

    without_worker, without_job = asyncio.run(verdicts())
    assert without_worker.outcome == without_job.outcome == "crash"
    assert "no process can be started" in without_worker.reason
    assert without_job.reason == "the verifier of node 0 was lost"


@contextmanager
def stranger(*answers):
    """The address of one who gives these answers, one to a connection, and hangs up."""

    def answer():
        for said in answers:
            channel, _ = listener.accept()
            with channel:
                channel.recv(1 << 16)
                channel.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        done = threads.submit(answer)
        yield listener.getsockname()
        done.result(5.0)


@pytest.mark.parametrize("said", [b"", b"\0\0", b"\0\0\0\7", b'\0\0\0\x09{"tier"', b"\0\0\0\2hm", b"\0\0\0\0017"])
def test_an_answer_that_breaks_off_or_is_none_is_a_lost_connection(said):
    with stranger(said) as address, pytest.raises(ConnectionError, match=r"127.0.0.1:\d+ (closed|answers with)"):
        ask(address, {}, 5.0)


def test_a_verifier_that_answers_like_a_stranger_is_tried_again(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_S", 0.01)
    welcome = pack({"tier": "unsafe", "workers": 1})
    answers = [pack({}), welcome, pack({}), b"\0\0\0\2hm", welcome + pack({}) + b"\0\0\0\2hm", welcome]

    async def connections(place):
        times = asyncio.Queue()
        place.open(lambda: times.put_nowait(place.tier))
        async with asyncio.timeout(10.0):
            found = [await times.get() for _ in range(2)]
        await place.close()
        return found

    with stranger(*answers) as address:
        place = RemotePlace(VerifierServer("node 0", lambda: address, "token"), "unsafe", compiles=False)
        assert asyncio.run(connections(place)) == ["unsafe", "unsafe"]


def test_a_server_that_cannot_make_the_wanted_box_refuses_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no bwrap in it
    with job(tmp_path, nodes=1) as running, pytest.raises(NoSandboxError, match=r"node 0 refuses: .*bubblewrap: "):
        CodeVerifier(tier="bubblewrap", servers=servers_of(running.meeting))


def test_a_server_that_does_not_come_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "START_LIMIT_S", 0.3)
    with pytest.raises(
        NoSandboxError, match=r"waited 0\.3 s for the verifier of node 4 in vain \(it does not listen\)"
    ):
        CodeVerifier(servers=[VerifierServer("node 4", lambda: None, "token")])


def test_a_server_listens_on_its_address_alone_and_its_token_is_on_no_command_line(tmp_path):
    with job(tmp_path, nodes=1) as running:
        verified(running, lambda v: batch(v, pairs=1))
        process = psutil.Process(running.processes[0].pid)
        heard = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert heard == ["127.0.0.1"]
        assert running.meeting.token() not in " ".join(process.cmdline())
