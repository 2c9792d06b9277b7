"""Whether a test can have hosts that are network namespaces (`benchmarks/hosts.py`)."""

import pytest
from namespaces import BENCHMARKS, hosts

__all__ = ["BENCHMARKS", "needs_hosts"]

missing = hosts.missing()
needs_hosts = pytest.mark.skipif(missing is not None, reason=missing or "")
