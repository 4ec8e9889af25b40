"""What needs an extra that is not installed says so in one line, without the story of the import below it; where the
package is there and broken, that story stays.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MISSING = [
    (
        "msgspec",
        "from obsdag import SQLiteJournal",
        "ImportError: the journal needs msgspec: pip install '{}'",
        "journal",
    ),
    (
        "h11",
        "from obsdag.ops import start_ops_server; start_ops_server(port=0)",
        "obsdag.errors.ConfigError: start_ops_server needs the package h11: pip install '{}'",
        "ops",
    ),
    (
        "requests",
        "from obsdag import Tracing; Tracing.otlp('http://127.0.0.1:4318')",
        "obsdag.errors.ConfigError: Tracing.otlp needs an exporter (No module named 'requests'): pip install '{}'",
        "otlp",
    ),
    ("ray", "from obsdag.ray import RayExecutor", "ImportError: RayExecutor needs Ray: pip install '{}'", "ray"),
]


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize(("package", "code", "message", "extra"), MISSING, ids=[each[0] for each in MISSING])
def test_a_missing_extra_is_told_in_one_line(package: str, code: str, message: str, extra: str) -> None:
    absent = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
{code}
"""
    told = _run(absent)

    assert told.splitlines()[-1] == message.format(f"obsdag[{extra}]")
    assert told.count("Traceback") == 1


@pytest.mark.parametrize(("package", "code", "message", "extra"), MISSING, ids=[each[0] for each in MISSING])
def test_a_broken_package_is_told_with_its_cause(
    tmp_path: Path, package: str, code: str, message: str, extra: str
) -> None:
    (tmp_path / f"{package}.py").write_text("import a_library_of_the_system")
    told = _run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}")

    assert "No module named 'a_library_of_the_system'" in told
    assert f"obsdag[{extra}]" in told.splitlines()[-1]
