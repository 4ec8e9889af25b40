"""How much memory a process uses, told in a way that shows a leak and nothing else.

The resident size grows in steps that are no leak: CPython takes arenas of 1 MiB and glibc heaps of as much as it likes,
and each goes back only when the last thing in it is gone. What a leak adds to is what is *allocated*: the bytes in
CPython's own blocks (`sys._debugmallocstats`) and those that malloc has given out (`mallinfo2`, glibc 2.33 and newer).
Both are exact, and neither changes when the same objects lie elsewhere.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import tempfile
from pathlib import Path

__all__ = ["allocated_bytes", "resident_bytes"]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _MallInfo(ctypes.Structure):
    _fields_ = (
        ("arena", ctypes.c_size_t), ("ordblks", ctypes.c_size_t), ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t), ("hblkhd", ctypes.c_size_t), ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t), ("uordblks", ctypes.c_size_t), ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )  # fmt: skip


def resident_bytes() -> int:
    """The process's resident size, after a collection and after malloc has given back what it can."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def allocated_bytes() -> int | None:
    """Bytes that are allocated, by CPython and by malloc; None where that is not told (another libc)."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _MallInfo
    told: _MallInfo = libc.mallinfo2()
    return _blocks_bytes() + int(told.uordblks) + int(told.hblkhd)


def _blocks_bytes() -> int:
    # The statistics are written to descriptor 2, whatever sys.stderr is.
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        own = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            sys._debugmallocstats()
        finally:
            os.dup2(own, 2)
            os.close(own)
        file.seek(0)
        text = file.read().decode()
    found = re.search(r"bytes in allocated blocks\s*=\s*([\d,]+)", text)
    assert found is not None, text[:500]
    return int(found[1].replace(",", ""))
