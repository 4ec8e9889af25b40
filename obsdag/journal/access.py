"""Who may write a journal's file, who has it open, and the lock of somebody who only reads it.

What SQLite would do itself on a connection that may write, and cannot where it may not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["READ_ONLY", "beside", "in_use", "lock_for_reading", "may_write"]

READ_ONLY: Final = "the file or its folder is read-only: run it as a user who may write both, or take a copy"
_SHARED: Final = (510, 0x40000002)
"""Length and place of what a reader of SQLite locks (SHARED_SIZE, SHARED_FIRST in its os.h)."""


def beside(path: str, ending: str) -> str:
    """A file that SQLite has beside the journal; of a link, beside what it leads to."""
    return f"{Path(path).resolve()}{ending}"


def may_write(path: str) -> bool:
    """Whether this user can commit to the file: write to it, and to its log or where that would be made."""
    log = beside(path, "-wal")
    return _writable(path) and _writable(log if os.path.exists(log) else os.path.dirname(log))


def _writable(path: str) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def lock_for_reading(path: str) -> int | None:
    """A descriptor with the lock that a reader of SQLite's has, until it is closed; None if another has the file open.
    Raises OSError.
    """
    import fcntl  # not on Windows

    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, *_SHARED)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def in_use(path: str) -> str:
    """That it is, and by whom."""
    return f"is in use by {_holder(path)}: one process at a time can have it open"


def _holder(path: str) -> str:
    """Who holds the file, as far as the system's table of locks says."""
    holders: set[int] = set()
    try:
        inodes = {os.stat(each).st_ino for each in (path, f"{path}-shm") if os.path.exists(each)}
        with open("/proc/locks", encoding="ascii") as table:
            for line in table:
                fields = [field for field in line.split() if field != "->"]
                if len(fields) > 5 and int(fields[5].rsplit(":", 1)[1]) in inodes:
                    holders.add(int(fields[4]))
    except (OSError, ValueError):
        holders = set()
    others = sorted(pid for pid in holders if pid > 0 and pid != os.getpid())
    if others:
        return f"process {others[0]}"
    return "another connection of this process" if holders else "another process"
