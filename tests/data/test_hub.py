"""Models of the hub, fetched by its real client from a small hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import GATED, Hub

from asyncrl.config import from_tree
from asyncrl.data import hub

NAME = "owner/model"
FETCH = """
import sys
from asyncrl.errors import NotHereError
from asyncrl.data.hub import fetch
for name in sys.argv[1:]:
    try:
        print(fetch("model.path", name, False))
    except NotHereError as error:
        print(error)
"""


@pytest.fixture
def model(tmp_path):
    """A model's files, and beside them what nobody needs."""
    folder = tmp_path / "model"
    (folder / "original").mkdir(parents=True)
    (folder / "onnx").mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "modeling_own.py"):
        (folder / name).write_text(json.dumps({"file": name}))  # the cache keeps equal contents once
    for name in ("model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth"):
        (folder / name).write_bytes(os.urandom(50_000))
    (folder / "consolidated.safetensors").write_bytes(b"again")
    (folder / "onnx/config.json").write_text("{}")
    return folder


@pytest.fixture
def start(tmp_path):
    """`start(url, *names)`: a process of its own, with this test's cache, that fetches them."""

    def start(url, *names):
        environment = {
            name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
        }
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        return subprocess.Popen(
            [sys.executable, "-c", FETCH, *names],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def said(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.splitlines(), errors


@pytest.mark.slow
def test_several_processes_fetch_what_is_needed_once_and_then_ask_nobody(model, start):
    served = Hub({NAME: model})
    with served.serving() as url:
        (first, errors), (second, others) = map(said, [start(url, NAME), start(url, NAME)])
        assert first[-1] == second[-1]
        assert "model.path=owner/model: fetching it from the Hugging Face hub ..." in first + second
        assert "%" in errors + others, "there is a progress bar"
        needed = ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
        assert served.fetched == dict.fromkeys(needed, 1)
        asked = len(served.requests)
        assert said(start(url, NAME))[0] == [first[-1]]
        assert len(served.requests) == asked
    assert said(start(url, NAME))[0] == [first[-1]]


def test_what_a_download_that_was_cut_off_lacks_is_fetched(model, start):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model-2.safetensors").write_bytes(os.urandom(50_000))
    served = Hub({NAME: model})
    with served.serving() as url:
        folder = Path(said(start(url, NAME))[0][-1])
        for name in ("model-2.safetensors", "tokenizer.json"):
            (folder / name).unlink()
        assert said(start(url, NAME))[0][-1] == str(folder)
    assert (folder / "model-2.safetensors").is_file()
    assert (folder / "tokenizer.json").is_file()


def test_a_model_without_safetensors_comes_in_the_old_format(model, start):
    (model / "model.safetensors").unlink()
    (model / "consolidated.safetensors").unlink()
    served = Hub({NAME: model})
    with served.serving() as url:
        said(start(url, NAME))
    assert served.fetched["pytorch_model.bin"] == 1


def test_what_cannot_be_had_is_told_with_key_and_remedy(model, start):
    with Hub({NAME: model}).serving() as url:
        (_, unknown, _, gated), _ = said(start(url, "owner/none", GATED))
    assert f"model.path=owner/none: cannot be fetched from {url}: there is no model of that name" in unknown
    assert "log in with hf auth login" in unknown
    assert f"its owners require you to accept their terms; accept them on {url}/{GATED}" in gated
    (_, unreachable), _ = said(start(url, NAME))  # nobody listens there any more
    assert f"model.path=owner/model: cannot be fetched from {url}" in unreachable
    assert "where the hub can be reached, or use a folder: model.path=FOLDER" in unreachable


@pytest.mark.parametrize(
    ("path", "is_name"),
    [("gpt2", True), ("Qwen/Qwen3-4B", True), ("models/tiny", False), ("./gpt2", False), ("a/b/c", False)],
)
def test_what_can_only_be_a_name_on_the_hub(path, is_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_name(path) is is_name


def test_roles_get_the_folders_and_a_reward_model_keeps_its_name():
    reward = {"models": [{"path": "o/judge"}, {"path": "/mine"}]}
    tree = {"model": {"path": "o/m"}, "data": {"path": "d"}, "reward": reward}
    config = from_tree(tree | {"objective": {"advantage": "gae"}, "critic": {}, "reference": {"path": "o/m"}})
    found = hub.with_folders(config, {"o/m": "/cache/1", "o/judge": "/cache/2"})
    assert (found.model.path, found.critic.path, found.reference.path) == ("/cache/1", None, "/cache/1")
    assert [(m.path, m.label) for m in found.reward.models] == [("/cache/2", "judge"), ("/mine", "mine")]
    assert [name for _, name, _ in hub.names(config)] == ["o/m", "o/m", "o/judge"]
