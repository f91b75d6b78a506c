"""What a benchmark takes from the project, and from other benchmarks, is still there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, pathlib
for path in sorted(pathlib.Path("benchmarks").glob("*.py")):
    importlib.import_module(f"benchmarks.{path.stem}")
"""


def test_every_benchmark_can_be_imported() -> None:
    """In a process of its own: some set the environment of theirs."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
