"""What is beside the narrow path (`benchmarks/house.py`) is entered only where a config names it."""

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOUSE = runpy.run_path(str(ROOT / "benchmarks" / "house.py"))
SCRIPT = """
import importlib, sys
import asyncrl
from asyncrl.cluster.hosts.fork_server import ROLES

for name in ROLES:
    importlib.import_module(name)
asyncrl.run(asyncrl.load(sys.argv[1]), progress=False)
print("\\n".join(["imported", *sys.modules]))
"""


def is_beside(module):
    parts = module.split(".")[1:]
    return any(parts[: len(room)] == [part.removesuffix(".py") for part in room] for room in HOUSE["BESIDE"])


def test_a_plain_run_imports_nothing_that_is_beside_the_narrow_path(make_config, run_script, tmp_path):
    """Worker, engine, coordinator and trainer in one process, which has imported what other roles are forked
    with, too (`fork_server.ROLES`), and, unlike what the tests are forked from, nothing else."""
    config = make_config("run.mode=inline", "run.steps=2", f"run.dir={tmp_path / 'run'}")
    path, script = tmp_path / "plain.yaml", tmp_path / "plain.py"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    script.write_text(SCRIPT)
    *_, imported = run_script(script, path, typed=True).partition("imported\n")
    own = [name for name in imported.split() if name.startswith("asyncrl.")]
    assert "asyncrl.trainer.step" in own and "asyncrl.rollout.engines.torch.batch" in own
    assert not [name for name in own if is_beside(name)]
    for room in HOUSE["BESIDE"]:
        assert (ROOT / "asyncrl").joinpath(*room).exists(), f"{'/'.join(room)} is gone"
