"""Without root's privilege to ignore the permissions of files: a thread, or a command in a process of its own.

`python tests/permissions.py clip_jax.convert …` runs the command like a user's, although the tests may run as root.
"""

import ctypes
import os
import runpy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

_VERSION = 0x20080522  # of the structures of capget(2)
_OVERRIDE = 0b110  # bits of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, capabilities(7)


def respect_permissions() -> None:
    """Give up the capabilities in this thread, and in threads that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    failed = libc.capget(header, sets)
    for row in range(3):  # effective, permitted, inheritable
        sets[row] &= ~_OVERRIDE
    if failed or libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def as_user(function, *arguments, **options):
    """Return the result of a call, or raise its error, in a thread that respects permissions."""
    with ThreadPoolExecutor(1, initializer=respect_permissions) as pool:
        return pool.submit(function, *arguments, **options).result()


if __name__ == "__main__":
    assert threading.active_count() == 1
    respect_permissions()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
