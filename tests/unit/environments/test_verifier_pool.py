import asyncio
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import waiting
from waiting import is_running

from millrace.environments.verifier_pool import VerifierPool, VerifierStartError

wait_until = partial(waiting.wait_until, limit=10.0)


def run(verifier, items, **options):
    """Verdicts of the items and the closed pool that gave them."""

    async def session():
        pool = VerifierPool(verifier, **{"workers": 2, "limit_s": 5.0, **options})
        try:
            return await pool.verify_all(items), pool
        finally:
            pids = pool.pids
            await pool.close()
            assert not [pid for pid in pids if is_alive(pid)]

    return asyncio.run(session())


def is_alive(pid):
    """Also true of a zombie."""
    return Path(f"/proc/{pid}").exists()


def test_results_keep_the_order_of_the_items():
    verdicts, pool = run("math:isqrt", [(i * i,) for i in range(50)], workers=3)
    assert [verdict.result for verdict in verdicts] == list(range(50))
    assert pool.counts.done == 50 and pool.counts.starts <= 3


def test_an_item_that_sleeps_is_killed_at_its_limit_and_the_others_are_answered():
    start = time.monotonic()
    verdicts, pool = run("time:sleep", [(60,), (0,), (0,), (0,)], limit_s=0.3)
    assert [verdict.outcome for verdict in verdicts] == ["timeout", "done", "done", "done"]
    assert verdicts[0].reason == "timeout" and pool.counts.timeouts == 1
    assert time.monotonic() - start < 10


def test_an_item_that_hangs_in_c_code_is_killed():
    verdicts, _ = run("math:factorial", [(10**8,), (5,)], limit_s=0.5, workers=1)
    assert [verdict.outcome for verdict in verdicts] == ["timeout", "done"]
    assert verdicts[1].result == 120


def test_a_worker_that_crashes_is_counted_and_replaced():
    verdicts, pool = run("os:_exit", [(3,), (4,)], workers=1)
    assert [verdict.reason for verdict in verdicts] == [f"verifier crashed (exit status {status})" for status in (3, 4)]
    assert pool.counts.crashes == 2 and pool.counts.starts == 2


def test_a_worker_killed_from_outside_is_reported_with_its_signal():
    verdicts, _ = run("signal:raise_signal", [(int(signal.SIGSEGV),)], workers=1)
    assert verdicts[0].reason == "verifier crashed (signal SIGSEGV)"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_that_a_scheduler_sends_to_every_process_make_no_verdict(number):
    verdicts, pool = run("signal:raise_signal", [(int(number),)], workers=1)
    assert verdicts[0].outcome == "done" and pool.counts.crashes == 0


def test_memory_is_limited():
    verdicts, _ = run("operator:mul", [("x", 10**10), ("x", 3)], workers=1, memory_bytes=1 << 30)
    assert [verdict.outcome for verdict in verdicts] == ["crash", "done"]


def test_a_verifier_that_cannot_be_imported_says_how_to_see_why():
    with pytest.raises(VerifierStartError, match=r"no_such_module:check does not start .*to see why, run"):
        run("no_such_module:check", [()])


def test_a_machine_without_room_for_a_process_is_told_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(VerifierStartError, match=r"no process can be started for the verifier builtins:len \("):
        run("builtins:len", [("x",)])


def test_a_request_larger_than_a_pipe_goes_through():
    verdicts, _ = run("builtins:len", [("x" * 1_000_000,)])
    assert verdicts[0].result == 1_000_000


def test_closing_ends_a_worker_in_the_middle_of_an_item():
    async def session():
        pool = VerifierPool("time:sleep", workers=1, limit_s=60.0)
        task = asyncio.create_task(pool.verify(60))
        while not pool.pids:
            await asyncio.sleep(0.02)
        (pid,) = pool.pids
        await pool.close()
        verdict = await task
        assert verdict.outcome == "crash" and not is_alive(pid)

    start = time.monotonic()
    asyncio.run(session())
    assert time.monotonic() - start < 10


def test_workers_import_no_torch():
    verdicts, _ = run("builtins:eval", [("'torch' in __import__('sys').modules",)])
    assert verdicts[0].result is False


OWNER = """
import asyncio, os
from millrace.environments.verifier_pool import VerifierPool
async def main():
    pool = VerifierPool("time:sleep", workers=2, limit_s=1.0)
    asyncio.create_task(pool.verify(60))
    await pool.verify(0)
    print(*pool.pids, flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""


def test_workers_end_when_their_owner_is_killed_even_in_the_middle_of_an_item():
    owner = subprocess.run([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env=os.environ, timeout=30)
    pids = [int(pid) for pid in owner.stdout.split()]
    assert len(pids) == 2
    wait_until(lambda: not any(is_running(pid) for pid in pids))
