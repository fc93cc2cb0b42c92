"""The process of a node, as the scheduler sees it."""

import signal
import subprocess
import sys

import pytest

from millrace.launch.node import CONTINUE

ENDS_SLOWLY = f"""
import os, sys, time
from millrace.launch import node, node_task

class Last:
    def __del__(self, write=os.write, sleep=time.sleep):  # called when the interpreter has given up its handlers
        write(1, b"shutting down\\n")
        sleep(0.5)

node_task.run_node = lambda *arguments, stop_asked: {CONTINUE}
sys.last = Last()
sys.exit(node.main(["run"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_that_comes_as_the_interpreter_shuts_down_does_not_change_the_exit_code(number):
    node = subprocess.Popen([sys.executable, "-c", ENDS_SLOWLY], stdout=subprocess.PIPE, text=True)
    assert node.stdout is not None and node.stdout.readline() == "shutting down\n"
    node.send_signal(number)
    assert node.wait(timeout=30) == CONTINUE
    node.stdout.close()
