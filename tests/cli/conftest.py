import json

import pytest

from asyncrl.tiny.tokenizer import byte_tokenizer

CONFIG = """\
model: {path: model}
data: {path: rows.jsonl, on_bad_row: skip}
reward:
  functions:
    - function: rewards.py:length
run: {steps: 10}
rollout: {group_size: 4, max_new_tokens: 32, slots: 16}
trainer: {batch_groups: 8, mini_batches: 2}
staleness: {max_staleness: 3}
"""


@pytest.fixture
def run_files(tmp_path, make_qwen3, monkeypatch):
    """The current folder holds `run.yaml` and all it names: a random model, 20 prompts and a broken row."""
    monkeypatch.chdir(tmp_path)
    make_qwen3(vocab_size=259).save_pretrained("model")
    byte_tokenizer(2048).save_pretrained("model")
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **columns):\n    return [len(c) for c in completions]\n"
    )
    rows = [json.dumps({"prompt": f"{i}+{i}="}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "[broken"]))
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path
