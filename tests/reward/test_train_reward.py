"""Bradley-Terry training from pairs, on a random model: what it learns, and what it refuses."""

import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from asyncrl.cli.main import main
from asyncrl.errors import ConfigError
from asyncrl.reward.train.run import RECORD, Settings, train_reward_model
from asyncrl.tiny.model import MAX_LENGTH, random_model
from asyncrl.tiny.pairs import sample_pair, worth, write_pairs
from asyncrl.tiny.skill import SortingProblem
from asyncrl.tiny.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "model"
    tokenizer = byte_tokenizer(MAX_LENGTH)
    random_model(tokenizer, 0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_it_learns_a_preference_and_saves_a_model_that_scores_by_it(model, tmp_path):
    """Chosen responses say yes, rejected ones no: a few steps must tell them apart on unseen prompts."""
    data = rows(
        tmp_path / "pairs.jsonl",
        *({"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(64)),
    )
    said = []
    reports = train_reward_model(
        Settings(str(model), data, tmp_path / "out", steps=12, lr=3e-3, batch_size=16), tell=said.append
    )
    assert reports[-1].accuracy == 1.0
    assert reports[-1].margin > 0
    assert math.isfinite(reports[-1].train_loss)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert saved.config.num_labels == 1
    assert all(torch.isfinite(p).all() for p in saved.parameters())
    assert (tmp_path / "out" / RECORD).exists()
    assert list((tmp_path / "out").glob("*.safetensors"))
    assert any("held-out accuracy" in text for text in said)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "p", "chosen": "yes"}, "rejected"),
        ({"prompt": "p", "chosen": "same", "rejected": "same"}, "2"),
        ({"prompt": "p", "chosen": 7, "rejected": "no"}, "chosen"),
        ({"prompt": "p", "chosen": "x" * 9000, "rejected": "no"}, "max-tokens"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(model, tmp_path, row, says):
    good = {"prompt": "p", "chosen": "yes", "rejected": "no"}
    data = rows(tmp_path / "pairs.jsonl", good, row)
    with pytest.raises(ConfigError, match=says) as refused:
        train_reward_model(Settings(str(model), data, tmp_path / "out"))
    assert "pairs.jsonl:2" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_not_replaced(model, tmp_path, capsys):
    data = rows(tmp_path / "pairs.jsonl", {"prompt": "p", "chosen": "yes", "rejected": "no"})
    arguments = ["--model", str(model), "--data", str(data), "--out", str(tmp_path)]
    assert main(["train-reward", *arguments]) == 2
    assert "it already exists" in capsys.readouterr().err


def test_tiny_pairs_prefer_the_response_that_is_nearer_to_the_right_answer(tmp_path):
    assert main(["tiny-pairs", str(tmp_path / "pairs.jsonl"), "--pairs", "200"]) == 0
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 200
    for pair in pairs:
        problem = SortingProblem(pair["prompt"][-1]["content"].removeprefix("sort "))
        assert worth(problem, pair["chosen"]) > worth(problem, pair["rejected"])
    again = tmp_path / "again.jsonl"
    write_pairs(again, pairs=200)
    assert again.read_text() == (tmp_path / "pairs.jsonl").read_text()
    assert sample_pair.__doc__


def test_worth_is_one_for_the_right_answer_only_and_little_for_tricks():
    problem = SortingProblem("dcab")
    assert worth(problem, "abcd") == 1
    for response in ("", "a" * 24, "abcd" * 6, "sort dcab", "zzzz", "abdc"):
        assert worth(problem, response) < 0.6
