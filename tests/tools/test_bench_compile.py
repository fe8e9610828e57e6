"""The benchmark of compile time still compiles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "bench_compile.py"


def test_a_step_is_compiled_and_its_seconds_are_printed(user_environment):
    call = [sys.executable, str(TOOL), "--child", "1", "0"]
    done = subprocess.run(call, env=user_environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 0
