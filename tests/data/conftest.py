import json

import pytest

from asyncrl.config import DataConfig
from asyncrl.tiny.tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer(max_length=4096)


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows (objects, or raw lines as text or bytes) and gives the `DataConfig` that reads them."""

    def write(*rows, **settings) -> DataConfig:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"".join(_line(row) + b"\n" for row in rows))
        return DataConfig(path=str(path), **settings)

    return write


def _line(row) -> bytes:
    if isinstance(row, bytes):
        return row
    return (row if isinstance(row, str) else json.dumps(row)).encode()
