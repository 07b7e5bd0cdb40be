from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from nemo_cosmos.evaluation.resources import describe_machine, measured


def test_time_and_the_peak_that_is_gone_at_the_end_are_seen():
    with measured(interval_s=0.01) as used:
        before = psutil.Process().memory_info().rss / 2**20
        block = np.ones(100 * 2**20, np.uint8)
        time.sleep(0.1)
        del block
    assert 0.1 <= used.seconds < 5
    assert used.peak_memory_mb > before + 90


def test_children_count():
    with measured(interval_s=0.01) as used:
        own = psutil.Process().memory_info().rss / 2**20
        subprocess.run([sys.executable, "-c", "import time; x = b'1' * (100 << 20); time.sleep(0.3)"], check=True)
    assert used.peak_memory_mb > own + 90


def test_a_step_that_fails_is_measured_too():
    with pytest.raises(RuntimeError, match="broken"), measured() as used:
        raise RuntimeError("broken")
    assert used.seconds > 0
    assert used.peak_memory_mb > 0


def test_the_machine_is_described_in_words():
    described = describe_machine()
    assert {"processor", "cores", "memory", "system"} <= set(described)
    assert all(isinstance(value, str) and value for value in described.values())
