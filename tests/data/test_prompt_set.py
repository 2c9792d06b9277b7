"""The file of prepared prompts: everything comes back, without torch, transformers or pickle."""

import subprocess
import sys

import numpy as np
import pytest

from asyncrl.data.load import load_prompts
from asyncrl.data.prompts import PromptFileError, PromptSet

NESTED = {"a": [1, 2.5, None, True], "b": {"ü": "x"}, "big": 2**64 - 1, "small": -(2**63), "nan": None}


def test_a_prompt_set_survives_its_file(jsonl, tokenizer, tmp_path):
    data = jsonl(
        {"prompt": "a", "nested": NESTED},
        {"prompt": [{"role": "user", "content": "b"}]},
        "bad",
        on_bad_row="skip",
    )
    prompts = load_prompts(data, tokenizer)
    prompts.save(tmp_path / "prompts.msgpack")
    loaded = PromptSet.load(tmp_path / "prompts.msgpack")
    assert loaded.skipped == prompts.skipped
    assert len(loaded) == 2
    for old, new in zip(prompts, loaded, strict=True):
        assert (new.index, new.prompt, new.columns) == (old.index, old.prompt, old.columns)
        assert new.prompt_ids.dtype == np.int32
        assert np.array_equal(new.prompt_ids, old.prompt_ids)


def test_held_out_rows_keep_their_numbers_in_a_file(jsonl, tokenizer, tmp_path):
    _, last = load_prompts(jsonl(*({"prompt": text} for text in "abcd")), tokenizer).split(2)
    last.save(tmp_path / "p")
    assert [row.index for row in PromptSet.load(tmp_path / "p")] == [2, 3]


def test_loading_imports_neither_torch_nor_transformers(jsonl, tokenizer, tmp_path):
    load_prompts(jsonl({"prompt": "a"}), tokenizer).save(tmp_path / "p")
    code = (
        "import sys; from asyncrl.data.prompts import PromptSet; import asyncrl.data.load;"
        f"assert len(PromptSet.load({str(tmp_path / 'p')!r})) == 1;"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_a_broken_file_is_refused(jsonl, tokenizer, tmp_path):
    path = tmp_path / "p"
    with pytest.raises(PromptFileError, match="cannot read the prepared prompts"):
        PromptSet.load(path)
    load_prompts(jsonl({"prompt": "a"}), tokenizer).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(PromptFileError, match="cannot read the prepared prompts"):
        PromptSet.load(path)
    path.write_bytes(whole.replace(b"asyncrl-prompts-1", b"asyncrl-prompts-0"))
    with pytest.raises(PromptFileError, match="has the format 'asyncrl-prompts-0'"):
        PromptSet.load(path)
