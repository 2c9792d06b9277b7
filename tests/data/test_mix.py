"""Several datasets with a share each: read, checked, split, and trained on."""

import json

import pytest

import asyncrl
from asyncrl.config import DataConfig
from asyncrl.config.load import from_tree
from asyncrl.data.load import count_rows, load_prompts
from asyncrl.data.prompts import PromptSet
from asyncrl.errors import ConfigError
from asyncrl.observe.metric_table import unnamed
from asyncrl.observe.metrics import read_metrics
from asyncrl.plan.outline import mix_epochs


@pytest.fixture
def mix(tmp_path):
    """Writes rows of datasets by name; gives their entries of `data.mix`."""

    def write(**datasets):
        entries = []
        for name, rows in datasets.items():
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            entries.append({"path": str(path)})
        return entries

    return write


def test_each_dataset_is_read_by_its_own_settings_and_else_by_those_of_all(mix, tokenizer):
    maths, chat = mix(
        maths=[{"question": "1+1"}], chat=[{"prompt": "Hi", "dataset": "own"}, {"prompt": "So"}]
    )
    data = DataConfig(mix=[maths | {"prompt_column": "question", "system_prompt": "Count."}, chat])
    prompts = load_prompts(data, tokenizer)
    assert [row.prompt for row in prompts][1:] == ["Hi", "So"]
    assert [message["content"] for message in prompts[0].prompt] == ["Count.", "1+1"]
    assert [row.columns["dataset"] for row in prompts] == ["maths", "own", "chat"]
    assert [row.dataset for row in prompts] == [0, 1, 1]
    assert prompts.counts() == count_rows(data) == [1, 2]


def test_versions_of_a_dataset_on_the_hub_have_names_of_their_own():
    data = DataConfig(
        mix=[{"path": "hub:org/maths-1.0"}, {"path": "hub:org/maths-1.5"}, {"path": "a/b.jsonl"}]
    )
    assert data.names == ["maths-1.0", "maths-1.5", "b"]


def test_the_last_rows_of_each_dataset_are_held_out(mix, tokenizer, tmp_path):
    rows = {name: [{"prompt": f"{name} {i}"} for i in range(n)] for name, n in (("a", 4), ("b", 3), ("c", 5))}
    prompts = load_prompts(DataConfig(mix=mix(**rows)), tokenizer)
    trained, held_out = prompts.split(2)
    assert [row.prompt for row in trained] == ["a 0", "a 1", "b 0", "c 0", "c 1", "c 2"]
    assert [row.prompt for row in held_out] == ["a 2", "a 3", "b 1", "b 2", "c 3", "c 4"]
    trained.save(tmp_path / "prompts")
    again = PromptSet.load(tmp_path / "prompts")
    assert [(row.index, row.dataset) for row in again] == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_a_broken_dataset_is_told_by_its_own_key(mix, tokenizer, tmp_path):
    good, bad = mix(good=[{"prompt": "Hi"}], bad=[{"text": "Hi"}])
    with pytest.raises(ConfigError, match=r"data\.mix\.1\.path=.*bad\.jsonl: 1 of 1 rows cannot be used"):
        load_prompts(DataConfig(mix=[good, bad]), tokenizer)
    with pytest.raises(ConfigError, match=r"data\.mix\.0\.path=.*none\.jsonl: there is no such file"):
        load_prompts(DataConfig(mix=[{"path": str(tmp_path / "none.jsonl")}, good]), tokenizer)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"path": ""}, "`data.path` is missing"),
        ({"path": "p.jsonl", "mix": [{"path": "a.jsonl"}]}, "both name datasets"),
        ({"mix": [{"path": "x/a.jsonl"}, {"path": "y/a.jsonl"}]}, "2 datasets called `a`"),
        ({"mix": [{"path": "a"}], "drop_last": True}, "data.drop_last=true needs a single dataset"),
        ({"mix": [{"path": "a", "until_step": 5}]}, "no dataset has prompts for step 5"),
        ({"mix": [{"path": "a", "from_step": 2}]}, "no dataset has prompts for step 0"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(settings, told, make_config):
    tree = make_config().model_dump(mode="python")
    tree["data"] |= {"path": ""} | settings
    with pytest.raises(ConfigError, match=told):
        from_tree(tree)


def test_a_run_trains_on_its_datasets_by_their_shares_and_stages(make_config, mix, tmp_path):
    config = make_config("run.mode=inline", "run.steps=6", f"run.dir={tmp_path / 'run'}")
    early, all_along = mix(
        early=[{"prompt": [{"role": "user", "content": f"early {i}"}]} for i in range(50)],
        late=[{"prompt": [{"role": "user", "content": f"late {i}"}]} for i in range(3)],
    )
    tree = config.model_dump(mode="python")
    tree["data"] |= {"path": "", "mix": [early | {"until_step": 3, "weight": 3.0}, all_along]}
    config = from_tree(tree)
    assert mix_epochs(config, [50, 3]) == pytest.approx(
        [3 * 0.75 * config.trainer.batch_groups / 50, (3 * 0.25 + 3) * config.trainer.batch_groups / 3]
    )
    asyncrl.run(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert unnamed({key for line in lines for key in line}) == []
    assert lines[-1]["data/epoch/early"] == lines[3]["data/epoch/early"] > 0
    assert "reward_of/early/mean" in lines[0]
    assert "reward_of/early/mean" not in lines[-1]
    assert "reward_of/late/mean" in lines[-1]
