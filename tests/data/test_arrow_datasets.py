"""Parquet files, folders saved by `datasets` and the hub: the same rows as from JSONL, and clear refusals."""

import datetime
import decimal
import sys

import pytest
from optional import optional

from asyncrl.config import DataConfig
from asyncrl.data.load import load_prompts
from asyncrl.errors import ConfigError

datasets = optional("datasets", reason="needs asyncrl[data]")
pa, pq = optional("pyarrow"), optional("pyarrow.parquet")

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Question {i}"}],
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"split": "train", "index": i},
    }
    for i in range(1500)
]


def expected_columns(i):
    return {name: value for name, value in ROWS[i].items() if name != "prompt"}


def test_parquet_gives_the_rows_nested_columns_included(tmp_path, tokenizer):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    prompts = load_prompts(DataConfig(path=str(tmp_path / "rows.parquet")), tokenizer)
    assert [row.prompt for row in prompts] == [row["prompt"] for row in ROWS]
    assert [row.columns for row in prompts] == [expected_columns(i) for i in range(1500)]


def test_values_without_a_json_form_are_converted_or_reported(tmp_path, tokenizer):
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "day": [datetime.date(2026, 1, 31), None],
            "at": [datetime.datetime(2026, 1, 31, 12, 30, tzinfo=datetime.UTC), None],
            "price": [decimal.Decimal("1.50"), None],
            "blob": [b"\x00\xff", None],
            "took": pa.array([None, datetime.timedelta(seconds=3)], pa.duration("s")),
        }
    )
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    prompts = load_prompts(DataConfig(path=str(path), on_bad_row="skip"), tokenizer)
    assert [row.columns for row in prompts] == [
        {
            "day": "2026-01-31",
            "at": "2026-01-31T12:30:00+00:00",
            "price": "1.50",
            "blob": b"\x00\xff",
            "took": None,
        }
    ]
    assert [str(bad) for bad in prompts.skipped] == [
        f"{path} row 1: column `took` holds a timedelta, which has no JSON form"
    ]


def test_a_broken_parquet_file_is_refused(tmp_path, tokenizer):
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match="not a readable Parquet file"):
        load_prompts(DataConfig(path=str(tmp_path / "rows.parquet")), tokenizer)


def test_a_folder_saved_by_datasets(tmp_path, tokenizer):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    prompts = load_prompts(DataConfig(path=str(tmp_path / "saved")), tokenizer)
    assert [row.columns for row in prompts] == [expected_columns(i) for i in range(1500)]


def test_a_folder_with_splits_saved_by_datasets(tmp_path, tokenizer):
    folder = str(tmp_path / "saved")
    splits = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(folder)
    assert [row.prompt for row in load_prompts(DataConfig(path=folder), tokenizer)] == ["train"]
    assert [row.prompt for row in load_prompts(DataConfig(path=folder, split="test"), tokenizer)] == ["test"]
    with pytest.raises(ConfigError, match=r"data.split=dev: .* has the splits train, test"):
        load_prompts(DataConfig(path=folder, split="dev"), tokenizer)


def test_without_the_package_the_extra_is_named(tmp_path, tokenizer, monkeypatch):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for path in (str(tmp_path / "rows.parquet"), str(tmp_path / "saved"), "hub:OWNER/NAME"):
        with pytest.raises(ConfigError, match=r"pip install 'asyncrl\[data\]'"):
            load_prompts(DataConfig(path=path), tokenizer)


def test_a_hub_dataset_is_asked_for_by_name_subset_and_split(tokenizer, monkeypatch):
    def load_dataset(name, subset, split):
        return datasets.Dataset.from_list([{"prompt": f"{name} {subset} {split}"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (row,) = load_prompts(DataConfig(path="hub:OWNER/NAME", subset="main", split="test"), tokenizer)
    assert row.prompt == "OWNER/NAME main test"


def test_a_hub_dataset_that_cannot_be_had_is_refused_with_the_reason(tokenizer, monkeypatch):
    def load_dataset(name, subset, split):
        raise ValueError("Config name is missing. Please pick one among: ['main', 'socratic']")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        ConfigError, match=r"data.path=hub:O/N \(split train, subset not given\).*\['main', 'soc"
    ):
        load_prompts(DataConfig(path="hub:O/N"), tokenizer)
