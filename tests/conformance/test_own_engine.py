"""A user's own engine, named in the config, does what those that come with the package do, and no file of the
package knows of it."""

import shutil
from pathlib import Path

import pytest
from own_engine import SPEC, PlainEngine

import asyncrl
from asyncrl.errors import ConfigError
from asyncrl.observe.metrics import read_metrics
from asyncrl.plan.preflight import plan

FILE = Path(__file__).with_name("own_engine.py")
OWN = (
    f"rollout.engine={FILE}:SPEC",
    "rollout.settings={side_by_side: 4}",
    "rollout.kv_on_update=recompute",
    "run.steps=2",
    "staleness.max_staleness=0",
    "rollout.max_new_tokens=6",
)


@pytest.mark.parametrize("mode", ["inline", pytest.param("async", marks=pytest.mark.slow)])
def test_a_run_by_a_users_own_engine(mode, make_config, tmp_path, monkeypatch):
    """It is named by a path from the working folder, which its processes do not share."""
    for file in (FILE, FILE.parents[1] / "engine_reference.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    run = asyncrl.run(
        make_config(*OWN, "rollout.engine=./own_engine.py:SPEC", f"run.mode={mode}"), progress=False
    )
    lines = read_metrics(run.run_dir / "metrics.jsonl")
    assert [line["version"] for line in lines] == [1, 2]
    assert all(line["trained_tokens"] > 0 and line["kl/behavior"] < 1e-3 for line in lines)
    assert {sample.step for sample in asyncrl.read_samples(run.run_dir)} == {1, 2}


def test_it_is_made_by_its_own_settings_and_scored_by_an_evaluation(make_config):
    config = make_config(*OWN, "data.held_out_rows=2")
    engine = SPEC.make(config, 8, shares_gpu=False)
    assert isinstance(engine, PlainEngine) and engine.capacity == 4
    assert asyncrl.evaluate_model(config).prompts == 2


def test_a_plan_counts_its_memory(make_config):
    config = make_config(*OWN)
    rollout = next(m for m in plan(config).outline.memory if m.kind == "rollout")
    embedded = plan(make_config()).outline.memory
    assert rollout.parts["weights"] == next(m for m in embedded if m.kind == "rollout").parts["weights"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "rollout.engine=torhc",
            r"did you mean `torch`\? There are `http`, `paced`, `torch`, `vllm`, and your own",
        ),
        (f"rollout.engine={FILE}:NONE", "has no `NONE`"),
        (f"rollout.engine={FILE}:PlainSettings", "derives from asyncrl.rollout.engines.spec.EngineSpec|Spec"),
        ("rollout.engine=nowhere.py:SPEC", "there is no file"),
        ("rollout.settings={side_by_side: 0}", "`side_by_side` is 0"),
        ("rollout.settings={}", "`side_by_side` is missing"),
        ("rollout.settings={side_by_site: 1}", "unknown key `side_by_site`; did you mean `side_by_side`"),
        ("rollout.kv_on_update=keep", "use rollout.kv_on_update=recompute"),
        ("rollout.tensor_parallel_size=2", "only rollout.engine=vllm splits a model"),
        ("rollout.engine=torch", "unknown key `side_by_side`"),
    ],
)
def test_what_cannot_work_is_refused(override, says, make_config):
    with pytest.raises(ConfigError, match=says):
        make_config(*OWN, override)
