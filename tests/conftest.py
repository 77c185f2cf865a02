"""Eight CPU devices, warnings as errors, shape annotations executed: before anything imports JAX.

Most of the time of the tests is compilation, and half of it the code generator's optimizations for the CPU: without
them here; with them in whole runs (tests/runs.py), in the demo, in tests/peers and by the fixture `optimized`.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("clip_jax", "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)

import ctypes  # noqa: E402
import gc  # noqa: E402
import pathlib  # noqa: E402

import pytest  # noqa: E402

RESIDENT_BYTES = 2 * 2**30  # compiled programs are freed above it, so that a worker stays below 3 GB
GROWTH_BYTES = 2**28  # at least, since programs were freed: freeing takes a second


def _free_programs():
    jax.clear_caches()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory otherwise
        libc.malloc_trim(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """With CLIP_JAX_NO_SKIPS, in CI, a skipped test fails, except those of published weights, which are not at hand."""
    try:
        return (yield)
    except pytest.skip.Exception as error:
        if os.environ.get("CLIP_JAX_NO_SKIPS") and "test_published_numbers" not in item.nodeid:
            pytest.fail(f"skipped in CI: {error}")
        raise


pytest_runtest_setup = pytest_runtest_call  # marks and fixtures


@pytest.fixture(autouse=True, scope="module")
def clear_caches():
    """Free a file's compiled programs at its end: no other file uses them."""
    yield
    _free_programs()


@pytest.fixture
def optimized():
    """Compile as users do, for comparisons close to the rounding of float32."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def _resident_bytes():
    statm = pathlib.Path("/proc/self/statm")  # Linux
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


_kept = 0  # resident bytes that were left when programs were freed


@pytest.fixture(autouse=True)
def bounded_memory():
    """Free compiled programs within a file that has many, unless most of the memory is of other things."""
    global _kept
    yield
    if _resident_bytes() > max(RESIDENT_BYTES, _kept + GROWTH_BYTES):
        _free_programs()
        _kept = _resident_bytes()
