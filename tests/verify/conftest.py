from __future__ import annotations

import time
from collections.abc import Callable

import pytest


@pytest.fixture
def cpu_seconds() -> Callable[[Callable[[], object]], float]:
    """Processor time of a call: other processes on the machine do not count."""

    def measure(call: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return measure
