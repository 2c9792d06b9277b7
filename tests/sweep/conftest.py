import json

import pytest


@pytest.fixture
def sweep_config(tiny_folder, tmp_path):
    """A file with the settings of a small inline run; its reward functions lie beside it."""
    (tmp_path / "rewards.py").write_text((tiny_folder / "rewards.py").read_text())
    (tmp_path / "broken.py").write_text("def broken(completions, **_):\n    raise KeyError('no answer')\n")
    tree = {
        "run": {
            "name": "small",
            "root": str(tmp_path / "runs"),
            "steps": 4,
            "mode": "inline",
            "stall_s": 60.0,
        },
        "model": {"path": str(tiny_folder)},
        "data": {"path": str(tiny_folder / "prompts.jsonl"), "max_prompt_tokens": 64},
        "rollout": {"group_size": 4, "max_new_tokens": 8, "slots": 16, "max_attempts": 1},
        "trainer": {"batch_groups": 4, "lr": 1e-3},
        "reward": {"functions": [{"function": f"{tmp_path / 'rewards.py'}:letter_share"}], "retries": 0},
        "staleness": {"max_staleness": 2},
        "observe": {"trackers": []},
    }
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(tree))
    return path
