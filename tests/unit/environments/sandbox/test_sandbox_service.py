"""The service before the boxes: verdicts in the middle of faults, and no verdict where there can be none."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from processes import no_process_left

from millrace.environments.sandbox import boxes, single_boxes, tiers
from millrace.environments.sandbox.places import QUEUED_PER_WORKER
from millrace.environments.sandbox.run import Limits, Program
from millrace.environments.sandbox.service import Case, CodeVerifier, SandboxError
from millrace.environments.sandbox.tiers import NoSandboxError, choose_tier, open_tier

LIMITS = Limits(wall_s=20.0, cpu_s=5, memory_bytes=512 << 20)
ADD = Program("print(sum(map(int, input().split())))")
SUBTRACT = Program("a, b = map(int, input().split())\nprint(a - b)")
SLOW_ADD = Program("import time\ntime.sleep(0.3)\n" + ADD.source)
SLOWER_ADD = Program("import time\ntime.sleep(1.5)\n" + ADD.source)
"""Still there when its processes have been looked for, on a machine with other work too."""
CASES = [Case(f"{n} {n + 1}", str(2 * n + 1)) for n in range(5)]


def session(work, **options):
    """What `work` gives with a verifier, which leaves no process behind."""

    async def run():
        verifier = CodeVerifier(**{"workers": 2, **options})
        try:
            return await work(verifier), verifier.statistics
        finally:
            await verifier.close()

    with no_process_left():
        return asyncio.run(run())


def outcomes(*programs, limits=LIMITS, cases=CASES, **options):
    async def work(verifier):
        return await asyncio.gather(*(verifier.verify(program, cases, limits) for program in programs))

    return session(work, **options)


async def until(condition):
    async with asyncio.timeout(20):
        while not (found := condition()):
            await asyncio.sleep(0.02)
    return found


def zygotes():
    """The launchers of zygotes below this process."""
    return [p for p in psutil.Process().children(recursive=True) if "sandbox.zygote" in " ".join(command(p))]


async def keeper_and_program(launcher):
    """Those of the program under test, which sleeps: a canary, with which every box begins, never does for long."""
    before = None
    async with asyncio.timeout(20):
        while True:
            found = [(k, p) for z in children(launcher) for k in children(z) for p in children(k) if is_asleep(p)]
            if found and found == before:
                return found[0]
            before = found
            await asyncio.sleep(0.2)


def children(process):
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def is_asleep(process):
    try:
        return process.status() == psutil.STATUS_SLEEPING
    except psutil.NoSuchProcess:
        return False


def command(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_a_batch_is_judged_in_order_and_counted():
    found, counts = outcomes(*[ADD, SUBTRACT] * 10)
    assert [outcome.failure for outcome in found] == [None, "test 1: wrong output '-1', not '1'"] * 10
    assert [(outcome.passed, outcome.ran) for outcome in found] == [(5, 5), (0, 1)] * 10
    assert (counts.programs, counts.tests, counts.passed, counts.faults) == (20, 60, 10, 0)


def test_no_more_programs_than_the_queue_holds_are_handed_to_workers():
    async def work(verifier):
        held, hand_over = [0], verifier.places[0].pool.verify

        async def counted(*arguments, **options):
            held.append(held[-1] + 1)
            try:
                return await hand_over(*arguments, **options)
            finally:
                held.append(held[-1] - 1)

        verifier.places[0].pool.verify = counted
        await asyncio.gather(*(verifier.verify(ADD, CASES, LIMITS) for _ in range(30)))
        return max(held)

    most, counts = session(work)
    assert most == 2 * (1 + QUEUED_PER_WORKER) and counts.programs == 30


@pytest.mark.parametrize("whom", ["worker", "launcher", "zygote"])
def test_a_process_that_is_killed_costs_no_verdict(whom):
    async def work(verifier):
        tasks = [asyncio.create_task(verifier.verify(each, CASES[:2], LIMITS)) for each in [SLOW_ADD, SUBTRACT] * 4]
        launcher = (await until(zygotes))[0]
        inner = (await until(launcher.children))[0]
        await until(inner.children)  # a keeper: a program is under way
        target = {"worker": launcher.parent(), "launcher": launcher, "zygote": inner}[whom]
        target.send_signal(signal.SIGKILL)
        return await asyncio.gather(*tasks)

    found, counts = session(work, tier="zygote")
    assert [outcome.failure for outcome in found] == [None, "test 1: wrong output '-1', not '1'"] * 4
    assert (counts.lost_workers, counts.faults > 0) == ((1, False) if whom == "worker" else (0, True))


def test_a_killed_program_has_failed_and_a_killed_keeper_is_a_fault():
    async def work(verifier):
        task = asyncio.create_task(verifier.verify(SLOWER_ADD, CASES[:1], LIMITS))
        keeper, _ = await keeper_and_program((await until(zygotes))[0])
        keeper.send_signal(signal.SIGKILL)
        return await task

    outcome, counts = session(work, tier="zygote", workers=1)
    assert outcome.failure is None and counts.faults == 1 and outcome.retries == 1
    found, counts = outcomes(Program("import os\nos.abort()"))
    assert found[0].failure.startswith("test 1: killed by signal") and counts.faults == 0


def test_a_program_that_the_machine_kills_is_run_again_and_one_that_kills_itself_has_failed():
    async def work(verifier):
        task = asyncio.create_task(verifier.verify(SLOWER_ADD, CASES[:1], LIMITS))
        _, program = await keeper_and_program((await until(zygotes))[0])
        program.send_signal(signal.SIGKILL)
        return await task

    outcome, counts = session(work, tier="zygote", workers=1)
    assert outcome.failure is None and (counts.faults, counts.lost_workers, outcome.retries) == (1, 0, 1)
    itself = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass"
    for tier, program in (("zygote", Program(itself)), ("unsafe", Program("import os\nos._exit(137)"))):
        (outcome,), counts = outcomes(program, cases=CASES[:1], tier=tier, workers=1)
        assert outcome.failure is not None and counts.faults == 1


def test_a_hundred_programs_that_never_end_are_ended_and_the_others_judged():
    endless = [Program("while True: pass"), Program("import time\ntime.sleep(1e6)")] * 50
    limits = LIMITS._replace(wall_s=0.1)
    found, counts = outcomes(*endless, ADD, limits=limits, cases=CASES[:1], workers=4)
    assert {outcome.failure for outcome in found[:-1]} == {"test 1: time limit"}
    assert counts.programs == 101 and counts.faults == counts.lost_workers == 0


def test_a_program_without_a_verdict_is_not_scored(monkeypatch):
    monkeypatch.setattr("millrace.environments.sandbox.places.CHECK", "os:abort")
    with pytest.raises(
        SandboxError, match=r"could not be tested .* 3 times: verifier crashed .*See that this machine has memory"
    ):
        outcomes(ADD)


def test_where_no_tier_is_there_programs_are_refused(monkeypatch):
    def unavailable():
        raise boxes.Unavailable("not today")

    monkeypatch.setattr(tiers, "TIERS", {"zygote": unavailable, "landlock": unavailable})
    with pytest.raises(
        NoSandboxError, match=r"cannot be run safely on this machine \(zygote: not today; landlock: not"
    ):
        CodeVerifier()


def test_a_tier_whose_canary_reaches_out_is_not_taken(monkeypatch):
    monkeypatch.setattr(tiers, "TIERS", {"open": single_boxes.OpenBox})
    with pytest.raises(NoSandboxError, match=r"open: a program in the box reads /etc/passwd, reads /proc, .*socket"):
        choose_tier("auto")


def test_without_isolation_each_start_warns_and_the_summary_says_so(caplog):
    verifier = CodeVerifier(tier="unsafe", workers=1)
    assert "programs that the model writes run as this user" in caplog.text
    assert verifier.summary().startswith("sandbox tier unsafe, WITHOUT ISOLATION: 0 programs")
    asyncio.run(verifier.close())


def test_a_box_that_is_gone_is_a_fault_and_the_next_run_starts_afresh():
    with no_process_left():
        box = open_tier("zygote") if zygote_works() else pytest.skip("no zygote on this machine")
        box.process.kill()
        with pytest.raises(boxes.SandboxFault, match="zygote"):
            box.run(ADD, b"1 2", LIMITS)
        assert box.run(ADD, b"1 2", LIMITS).stdout == b"3\n"
        box.close()


NEIGHBOUR = """
import ctypes
libc = ctypes.CDLL(None)
libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
end, wanted = libc.sbrk(0), "REHTONA_FO_NOITULOS"[::-1].encode()
for page in range(1, 257):  # down the heap, to its beginning if it is smaller
    print(ctypes.string_at(end - page * 4096, 4096).count(wanted), flush=True)
"""


def test_a_program_finds_nothing_of_those_that_ran_before_it():
    with no_process_left():
        box = open_tier("zygote") if zygote_works() else pytest.skip("no zygote on this machine")
        box.run(Program("#" + 400 * "SOLUTION_OF_ANOTHER"), b"SOLUTION_OF_ANOTHER", LIMITS)
        found = box.run(Program(NEIGHBOUR), b"", LIMITS).stdout.split()
        assert len(found) > 16 and set(found) == {b"0"}
        box.close()


def zygote_works():
    try:
        return choose_tier("zygote") == "zygote"
    except NoSandboxError:
        return False


FULL = """
import asyncio, sys
from millrace.environments.sandbox import kernel
from millrace.environments.sandbox.run import Limits, Program
from millrace.environments.sandbox.service import Case, CodeVerifier

kernel.unshare(kernel.CLONE_NEWNS)
kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
for folder in ("/tmp", "/var/tmp", "/dev/shm"):
    kernel.mount("tmpfs", folder, "tmpfs", 0, "size=4k,nr_inodes=2")
    with open(folder + "/full", "wb", buffering=0) as file:
        file.write(bytes(4096))

async def main():
    verifier = CodeVerifier(workers=1)
    case = [Case("1 2", "3")]
    for source in ("print(sum(map(int, input().split())))", "print(1)"):
        print((await verifier.verify(Program(source), case, Limits())).failure)
    await verifier.close()

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can put a full file system in the place of /tmp")
def test_a_full_tmp_changes_no_verdict():
    if Path(__file__).resolve().is_relative_to("/tmp"):
        pytest.skip("the repository itself lies in /tmp, which this test hides")
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["None", "test 1: wrong output '1', not '3'"], done.stderr
