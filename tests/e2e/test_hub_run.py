"""A run on a model of the hub: fetched before any process starts, and taken from the cache by all of them."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import Hub

MAIN = """
import os, sys, urllib.request
from asyncrl.cli.launch import main
config = ["--config", sys.argv[1], "--gpus", "0"]
assert main([*config, "--dry-run"]) == 0
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/api/models/owner/tiny").close()
sys.exit(main(config))
"""


@pytest.mark.slow
def test_models_are_fetched_before_any_process_starts(make_config, tiny_folder, tmp_path):
    make_config()
    settings = json.loads((tmp_path / "config.yaml").read_text())
    settings["model"]["path"] = "owner/tiny"
    settings["run"]["steps"] = 1
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    served = Hub({"owner/tiny": tiny_folder})
    with served.serving() as url:
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"no_proxy": "127.0.0.1"}
        result = subprocess.run(
            [sys.executable, "-c", MAIN, str(tmp_path / "config.yaml")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=800,
        )
    assert result.returncode == 0, result.stderr
    assert "hf download owner/tiny" in result.stdout
    requests = [what for _, what in served.requests]
    assert requests[0] == "GET api/models/owner/tiny", "the dry run has asked for nothing"
    assert requests.count("GET api/models/owner/tiny") == 2
    assert served.fetched["model.safetensors"] == 1
    started = (tmp_path / "run" / "config.yaml").stat().st_mtime
    assert max(when for when, _ in served.requests) < started
    assert "path: owner/tiny" in (tmp_path / "run" / "config.yaml").read_text()
