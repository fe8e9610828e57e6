"""SIGTERM: noticed between steps, and passed on by `run` to the stage that is at work."""

import os
import signal
import subprocess
import sys

from jaxdistill.parallel.processes import STOPPED, StopSignal

CHILD = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('up', flush=True); "
PARENT = """
import os, sys
from jaxdistill.cli import _call
sys.exit(_call([sys.executable, "-c", sys.argv[1]], os.environ))
"""


def test_a_signal_is_noticed_and_the_handler_before_it_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_run_passes_it_on_and_ends_with_the_stage_s_code():
    command = [sys.executable, "-c", PARENT, CHILD + "time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=50) == STOPPED
