import os
import uuid

import pytest

from asyncrl.weights.shm.segment import sweep


@pytest.fixture
def prefix():
    """A name for shared memory that nobody else uses; swept whatever the test does."""
    name = f"asyncrl-test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    yield name
    sweep(name)
