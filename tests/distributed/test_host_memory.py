"""Freed memory is kept by the process, unless its user has set malloc."""

import os
import platform
import sys

import pytest

from tests.helpers.launching import run_command

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the parameters are those of glibc's malloc")

SCRIPT = """
import resource
from pipeline.distributed.host_memory import keep_freed_memory

def faults(blocks):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(blocks):
        bytearray(40 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults(5)
keep_freed_memory()
faults(1)
print(before, faults(5))
"""
"""Page faults of five blocks of 40 MiB, each freed before the next: before and after."""
PAGES = 5 * 40 * 2**20 // os.sysconf("SC_PAGE_SIZE")


def page_faults(**environment: str) -> tuple[int, int]:
    result = run_command(sys.executable, "-c", SCRIPT, **environment)
    before, after = map(int, result.stdout.split())
    return before, after


def test_freed_memory_is_used_again_without_a_page_fault():
    before, after = page_faults()
    assert before > 0.9 * PAGES
    assert after < 0.01 * PAGES


def test_the_users_own_setting_wins():
    _, after = page_faults(MALLOC_MMAP_THRESHOLD_="131072")
    assert after > 0.9 * PAGES
