"""A file for Prometheus's `file_sd_configs`: where this process's `/metrics` is, for as long as it serves there.

Several processes of one service (uvicorn's workers, say) have a port each, chosen when they start. Each writes one file
of its own into a folder that Prometheus reads as `FOLDER/*.json`, so they need no lock. Files of processes that were
killed are taken away by the next one that starts on the same machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

__all__ = ["TargetFile"]


class TargetFile:
    """One target file in `folder`, written whole or not at all; `remove` takes it away.

    target: host:port. labels: further ones for the target's series.
    """

    def __init__(self, folder: str | os.PathLike[str], target: str, labels: Mapping[str, str] | None = None) -> None:
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        self._prefix = f"obsdag-{socket.gethostname()}-"
        self._remove_stale(place)
        port = target.rpartition(":")[2]
        self.path = place / f"{self._prefix}{os.getpid()}-{port}.json"
        groups = [{"targets": [target], "labels": {"process": str(os.getpid()), **(labels or {})}}]
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(groups) + "\n", encoding="utf-8")
        draft.replace(self.path)

    def _remove_stale(self, place: Path) -> None:
        for file in place.glob(f"{self._prefix}*.json"):
            pid = file.name.removeprefix(self._prefix).partition("-")[0]
            if pid.isdigit() and not _lives(int(pid)):
                file.unlink(missing_ok=True)

    def remove(self) -> None:
        """The process serves there no longer."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
