"""What memory there is."""

from __future__ import annotations

import numpy as np

from runtime.memory import MemoryUse, device_memory, device_name, host_memory, peak_rss_bytes


def test_the_memory_of_the_host_is_in_bytes() -> None:
    before = host_memory()
    block = np.ones(64 * 2**20, np.uint8)
    after = host_memory()
    assert after.total_bytes == before.total_bytes > 2**28
    assert 0 < after.free_bytes <= after.total_bytes
    assert after.used_bytes >= before.used_bytes + 48 * 2**20
    assert after.peak_bytes == peak_rss_bytes() >= after.used_bytes - 2**20
    assert block.nbytes == 64 * 2**20


def test_a_cpu_has_no_memory_of_its_own() -> None:
    assert device_memory("cpu") == MemoryUse(0, 0, 0, 0)
    assert device_name("cpu") == "CPU"
