"""Files for Prometheus's file_sd: one per process, whole, and gone when the process is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from obsdag.ops import start_ops_server


def test_a_target_is_there_for_as_long_as_it_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "targets"
    with start_ops_server(port=0, file_sd=folder, labels={"service": "shop"}) as ops:
        (file,) = folder.iterdir()
        groups = json.loads(file.read_text())
        mode = file.stat().st_mode & 0o777

    assert groups == [
        {"targets": [f"127.0.0.1:{ops.port}"], "labels": {"process": str(os.getpid()), "service": "shop"}}
    ]
    assert mode & 0o444 == 0o444, "Prometheus runs as somebody else"
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_is_taken_away_and_nothing_else(tmp_path: Path) -> None:
    ask = [sys.executable, "-c", "import os; print(os.getpid())"]
    gone = subprocess.run(ask, capture_output=True, text=True, check=True)
    ours = f"obsdag-{socket.gethostname()}-"
    stale = tmp_path / f"{ours}{gone.stdout.strip()}-1.json"
    kept = [tmp_path / f"{ours}{os.getppid()}-1.json", tmp_path / "obsdag-another.host-1-1.json", tmp_path / "own.json"]
    for file in (stale, *kept):
        file.write_text("[]")
    with start_ops_server(port=0, file_sd=tmp_path):
        assert not stale.exists()
        assert all(file.exists() for file in kept)
