import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gradot_jax.memory.process import (
    peak_resident_bytes,
    peak_rss_bytes,
    process_memory,
    reset_peak,
    resident_bytes,
)

LARGE = 64 * 2**20
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def test_the_peak_counts_what_was_given_back():
    held = np.ones(LARGE, np.uint8)
    del held
    assert peak_rss_bytes() > LARGE


@linux
def test_a_process_is_read_in_bytes_and_nothing_once_it_is_gone():
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        memory = process_memory(process.pid)
        process.communicate(b"\n")
    assert memory["VmRSS"] <= memory["VmHWM"]
    # A page at least, and less than any machine has.
    assert 2**12 <= memory["VmRSS"] < 2**40
    assert process_memory(process.pid) == {}


@linux
def test_a_peak_that_is_reset_forgets_what_was_before():
    held = np.ones(LARGE, np.uint8)
    assert resident_bytes() > LARGE
    del held
    assert reset_peak()
    before = peak_resident_bytes()
    held = np.ones(LARGE, np.uint8)
    assert peak_resident_bytes() - before > LARGE // 2
    del held
