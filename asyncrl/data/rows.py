"""Reads the rows of a dataset from any source: each is a mapping and its origin, or the reason why it is
broken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from asyncrl.config import DataConfig
from asyncrl.config.data import HUB, REASONING_GYM, SUITE
from asyncrl.data.nulls import without_filled
from asyncrl.data.prompts import BadRow
from asyncrl.data.suites.rows import asked, path_of, source, suite_of
from asyncrl.data.template import ARGUMENTS, TOOLS
from asyncrl.errors import ConfigError, NotHereError
from asyncrl.packages import install_command
from asyncrl.paths import user_path

if TYPE_CHECKING:
    import pyarrow as pa

Row: TypeAlias = tuple[str, dict[str, Any]]
"""The origin of a row, and the row."""

_BATCH_ROWS = 1024


def is_on_hub(data: DataConfig) -> bool:
    """Whether reading the datasets downloads one, unless it is cached."""
    return any(path_of(dataset).startswith(HUB) for dataset in data.datasets)


def told(data: DataConfig) -> str:
    """The datasets, for messages."""
    return ", ".join(dataset.path for dataset in data.datasets)


def read_rows(data: DataConfig) -> Iterator[Row | BadRow]:
    """Every row of one dataset, in order. Raises `ConfigError` if there is no such dataset."""
    if data.path.startswith(REASONING_GYM):
        from asyncrl.data.reasoning_gym import rows_of

        return rows_of(data)
    if data.path.startswith(SUITE):
        suite = suite_of(f"{data.key.removesuffix('path')}name", data.path.removeprefix(SUITE))
        return asked(suite, read_rows(source(data, suite)), data.prompt_column)
    if data.options:
        raise ConfigError(
            f"{data.options_key}: {data.path} has none; they are those of a {REASONING_GYM}TASK"
        )
    if is_on_hub(data):
        return _hub(data)
    path = user_path(data.path, f"{data.key}={data.path}")
    if path.is_dir():
        return _saved_by_datasets(path, data)
    if not path.exists():
        looks_like_hub = not path.suffix and re.fullmatch(r"\w[\w.-]*/[\w.-]+", data.path)
        instead = f"{data.key}=hub:{data.path} if it is a dataset of the hub" if looks_like_hub else ""
        raise NotHereError(
            f"{data.key}={data.path}: there is no such file or folder (looked for {path.absolute()})",
            command=instead or f"name yours: {data.key}=FILE.jsonl, or put it there",
            advice="write a dataset of the Hugging Face hub as hub:OWNER/NAME, a task of reasoning-gym as "
            f"{REASONING_GYM}TASK",
        )
    if path.suffix in (".jsonl", ".ndjson"):
        return _jsonl(path, data)
    if path.suffix == ".parquet":
        return _parquet(path, data)
    raise ConfigError(
        f"{data.key}={data.path}: `{path.suffix or path.name}` files are not supported; use a .jsonl file "
        "(one JSON object per line), a .parquet file, a folder saved by Hugging Face `datasets`, or "
        "hub:OWNER/NAME"
    )


def read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    """Every row of a file with one JSON object per line. Raises `OSError`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_row(f"{path}:{number}", line.rstrip(b"\r\n"))


def _jsonl(path: Path, data: DataConfig) -> Iterator[Row | BadRow]:
    try:
        yield from read_jsonl(path)
    except OSError as error:
        raise ConfigError(f"{data.key}={path}: cannot read it: {error.strerror}") from None


def _json_row(where: str, line: bytes) -> Row | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(where, f"not UTF-8: {error.reason} at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return BadRow(where, f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRow(where, "not usable: nested too deeply")
    except ValueError as error:
        return BadRow(where, f"not usable: {error}")  # a number of thousands of digits
    if not isinstance(row, dict):
        kinds = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
        return BadRow(where, f"not a JSON object but {kinds.get(type(row), 'null')}")
    return where, row


def _parquet(path: Path, data: DataConfig) -> Iterator[Row | BadRow]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise _needs_datasets(data, "a Parquet file") from None
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in _arrow_rows(batch, data):
                    yield f"{path} row {number}", row
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{data.key}={path}: not a readable Parquet file: {error}") from None


def _saved_by_datasets(path: Path, data: DataConfig) -> Iterator[Row | BadRow]:
    has_splits = (path / "dataset_dict.json").is_file()
    if not has_splits and not (path / "state.json").is_file():
        raise ConfigError(
            f"{data.key}={data.path}: this folder was not saved by Hugging Face `datasets` (`save_to_disk`); "
            "name a .jsonl or .parquet file in it"
        )
    try:
        import datasets
    except ImportError:
        raise _needs_datasets(data, "a folder saved by Hugging Face `datasets`") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{data.key}={data.path}: `datasets` cannot load it: {error}") from None
    if has_splits:
        if data.split not in loaded:
            raise ConfigError(f"data.split={data.split}: {data.path} has the splits {', '.join(loaded)}")
        loaded = loaded[data.split]
    return _dataset_rows(loaded, str(path), data)


def _hub(data: DataConfig) -> Iterator[Row | BadRow]:
    try:
        import datasets
    except ImportError:
        raise _needs_datasets(data, "a hub dataset") from None
    name = data.path.removeprefix(HUB)
    try:
        loaded = datasets.load_dataset(name, data.subset, split=data.split)
    except Exception as error:  # the hub's client, its HTTP library and `datasets` have their own kinds
        raise NotHereError(
            f"{data.key}={data.path} (split {data.split}, subset {data.subset or 'not given'}): `datasets` "
            f"cannot load it: {type(error).__name__}: {error}",
            command=f"check the network, or name a file: {data.key}=FILE.jsonl",
        ) from error
    return _dataset_rows(loaded, data.path, data)


def _dataset_rows(dataset: Any, name: str, data: DataConfig) -> Iterator[Row]:
    """Rows of a `datasets.Dataset`, from its Arrow table, so that nothing is decoded (images stay bytes)."""
    number = 0
    for batch in dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        for row in _arrow_rows(batch, data):
            yield f"{name} row {number}", row
            number += 1


def _arrow_rows(batch: pa.Table | pa.RecordBatch, data: DataConfig) -> Iterator[dict[str, Any]]:
    """Columns that the chat template reads lose the nulls that Arrow filled in; the others stay as they
    are."""
    read = {f.name: f.type for f in batch.schema if f.name in (data.prompt_column, TOOLS, ARGUMENTS)}
    for row in batch.to_pylist():
        yield row | {name: without_filled(row[name], kind) for name, kind in read.items()}


def _needs_datasets(data: DataConfig, kind: str) -> NotHereError:
    command = install_command("datasets")
    return NotHereError(
        f"{data.key}={data.path}: reading {kind} needs the package `datasets`",
        command=command,
        advice=f"{command} (a .jsonl file needs no extra package)",
    )
