"""Stopping a run: what a signal does while rank 0 waits, and while it does not."""

import os
import signal
import threading
import time

import pytest

from millrace.stages.control import Stopped


def send_soon(number: signal.Signals) -> None:
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_long_wait_is_left_as_soon_as_a_stop_is_asked_for(control, number):
    send_soon(number)
    began = time.monotonic()
    with pytest.raises(Stopped):
        control.on_main_until_stopped(lambda: time.sleep(30))
    assert time.monotonic() - began < 5
    assert control.should_stop()


def test_a_wait_that_would_begin_after_the_request_does_not_begin(control):
    control.ask_to_stop()
    begun = []
    with pytest.raises(Stopped):
        control.on_main_until_stopped(lambda: begun.append(1))
    assert not begun


def test_other_work_is_finished_before_the_run_stops(control):
    send_soon(signal.SIGINT)
    assert control.on_main(lambda: time.sleep(0.5) or "done") == "done"
    assert control.should_stop()


def test_without_a_request_the_result_is_everybodys(control):
    assert control.on_main_until_stopped(lambda: 7) == 7
    assert not control.should_stop()
