"""Whether a test can have hosts that are network namespaces (`benchmarks/hosts.py`)."""

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
missing = runpy.run_path(str(BENCHMARKS / "hosts.py"))["missing"]()
needs_hosts = pytest.mark.skipif(missing is not None, reason=missing or "")
