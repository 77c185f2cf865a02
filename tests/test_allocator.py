"""Freed memory is kept if JAX runs on CPU only; the allocator is unchanged otherwise."""

import os
import platform
import subprocess
import sys

import pytest

# Write to and free a block of 256 MiB five times; print the page faults of the last time.
FAULTS = """
import ctypes, resource
from clip_jax.devices import allocator
kept = allocator.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**28)
    ctypes.memset(block, 1, 2**28)
    libc.free(block)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 2**28 // 4096


def kept_and_faults(platforms):
    environment = {**os.environ, "JAX_PLATFORMS": platforms}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("platforms, expected", [("cpu", True), ("tpu", False), ("cuda,cpu", False)])
def test_freed_pages_are_kept_on_cpu_only(platforms, expected):
    kept, faults = kept_and_faults(platforms)
    assert kept == expected
    assert (faults < PAGES // 100) == expected  # no exact number: the kernel may map large pages
