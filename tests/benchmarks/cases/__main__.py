"""See the package."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from tests.benchmarks.cases import CASES

parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cases")
parser.add_argument("name", choices=CASES)
parser.add_argument("--quick", action="store_true")
options = parser.parse_args()
json.dump(importlib.import_module(f"tests.benchmarks.cases.{options.name}").run(options.quick), sys.stdout, indent=1)
