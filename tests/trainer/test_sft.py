"""Demonstrations beside samples."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import make_batch, with_true_logprobs
from transformers import AutoModelForCausalLM

from asyncrl.data.demonstrations import Demonstration, load_demonstrations
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.errors import ConfigError
from asyncrl.section import with_values
from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.lessons.sft import Sft, rows_of

ROWS = [{"prompt": f"w{i}", "response": f"w{i + 20}"} for i in range(20, 40)]
END = 1


@pytest.mark.parametrize(("number", "rows"), [(3, 20), (20, 20), (7, 3), (1, 1)])
def test_every_epoch_has_each_row_once_however_steps_cut_it(number, rows):
    turns = 4 * rows
    dealt = np.concatenate([rows_of(turn, number, rows, seed=5) for turn in range(turns)])
    assert len(dealt) == turns * number
    epochs = dealt.reshape(-1, rows)
    assert (np.sort(epochs) == np.arange(rows)).all()
    if rows > 3:
        assert (epochs[0] != epochs[1]).any()
        assert (rows_of(0, rows, rows, seed=6) != epochs[0]).any()


@pytest.fixture
def config_of(make_qwen3, save_model, make_config, tmp_path):
    path = save_model(make_qwen3())
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    def config_of(sft=None, rows=None, data=None, **trainer):
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return make_config(
            path,
            run={"steps": 10},
            data=data or {},
            rollout={"max_new_tokens": 3},
            sft={"path": str(tmp_path / "rows.jsonl"), "rows": 6, **(sft or {})},
            trainer={"max_grad_norm": 1e9, "micro_batch_tokens": 64, "mini_batches": 2, **trainer},
        )

    return config_of


@pytest.fixture
def batch(make_qwen3):
    """One that by itself teaches nothing."""
    made = with_true_logprobs(make_batch(0), make_qwen3(), noise=0.0)
    for group in made.groups:
        for trajectory in group.trajectories:
            trajectory.reward = 1.0
    return made


def test_a_demonstration_is_what_the_policy_would_sample(config_of):
    config = config_of(rows=[*ROWS[:2], {"prompt": "w5", "response": [{"content": "w7"}]}])
    found = load_demonstrations(config, load_tokenizer(config.model))
    assert [(p.tolist(), r.tolist()) for p, r in found] == [
        ([20], [40, END]),
        ([21], [41, END]),
        ([5], [7, END]),
    ]


def test_rows_that_cannot_be_learnt_from_are_named_or_left_out(config_of):
    bad = [{"prompt": "w1", "answer": "w2"}, {"prompt": "w1", "response": ""}]
    config = config_of(rows=[*ROWS[:2], *bad])
    with pytest.raises(ConfigError) as refused:
        load_demonstrations(config, load_tokenizer(config.model))
    message = str(refused.value)
    assert "sft.path=" in message and "2 of 4 rows cannot be learnt from" in message
    assert "usable row 2: no text in the column `response` (sft.response_column)" in message
    skipping = config_of(data={"on_bad_row": "skip"}, rows=[*ROWS[:2], *bad])
    assert len(load_demonstrations(skipping, load_tokenizer(skipping.model))) == 2
    short = with_values(config_of(rows=ROWS), {"rollout.max_new_tokens": 1})
    with pytest.raises(ConfigError, match=r"the response has 2 tokens; rollout\.max_new_tokens is 1"):
        load_demonstrations(short, load_tokenizer(short.model))


@pytest.mark.parametrize("loss", ["likelihood", "rl_plus"])
def test_the_gradient_is_that_of_the_mean_loss_of_the_steps_rows(config_of, batch, loss):
    config = config_of({"coef": 0.5, "loss": loss}, lr=1e-12, mini_batches=1)
    trainer = make_trainer(config)
    metrics = trainer.step(batch)
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    rows = rows_of(batch.step, 6, len(ROWS), config.run.seed)
    ids = torch.tensor([[20 + row, 40 + row, END] for row in rows])
    labels = torch.where(torch.arange(3) > 0, ids, -100)
    out = model(input_ids=ids, labels=labels)
    p = out.logits[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    weights = (1 - p.detach()).sqrt() * 2 * p / (p.detach() + (p.detach() + 1) / 2)
    (0.5 * (out.loss if loss == "likelihood" else -weights.mean())).backward()
    assert metrics["sft/loss"] == pytest.approx(float(out.loss.detach()), rel=1e-5)
    assert metrics["sft/tokens"] == 12
    learner = trainer._step.policy.policy
    for name, parameter in model.named_parameters():
        got = learner._adamw.state[learner._masters[name]]["exp_avg"] / 0.1
        torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-7)


def weights(trainer):
    return torch.cat([t.detach().flatten() for t in trainer.weights().values()])


def at(batch, step):
    return type(batch)(step, batch.version, batch.oldest_version, batch.groups)


def test_the_packing_makes_no_difference(config_of, batch):
    found = []
    for settings in ({}, {"micro_batch_tokens": 1}):
        trainer = make_trainer(config_of(lr=1e-3, eps=1e-4, **settings))
        trainer.step(batch)
        found.append(weights(trainer))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_run_that_goes_on_learns_the_rows_that_it_would_have_learnt(config_of, batch, tmp_path):
    """Only every second step has some, so steps 1 and 3; bit by bit, and what is learnt is kept in mind."""
    config = config_of({"every_steps": 2, "rows": 20}, lr=3e-3)
    trainer, losses = make_trainer(config), []
    for step in range(4):
        if step == 2:
            (tmp_path / "saved").mkdir()
            trainer.snapshot().write(tmp_path / "saved")
        losses.append(trainer.step(at(batch, step)).get("sft/loss"))
    again = make_trainer(config)
    again.restore(tmp_path / "saved")
    for step in (2, 3):
        again.step(at(batch, step))
    assert torch.equal(weights(trainer), weights(again))
    assert losses[0] is losses[2] is None
    assert losses[3] < losses[1]


def test_only_what_no_response_answers_is_demonstrated(config_of, batch, make_qwen3):
    """Of the groups, the first has no demonstration, and the second needs none; one begins with the prompt of
    another row."""
    groups = batch.groups
    prompts = [g.trajectories[0].token_ids[: g.trajectories[0].loss_mask.argmax()] for g in groups]
    for i, group in enumerate(groups):
        for trajectory in group.trajectories:
            trajectory.reward = -1.0
        group.trajectories[0].reward = 1.0 if i == 1 else 0.0
    longer = next(i for i in (2, 3) if len(prompts[i]) > 1)
    rows = [*prompts[1:], prompts[longer][:-1]]
    trainer = make_trainer(config_of({"choose": "failed", "rows": 2}))
    [lesson] = trainer._step.lessons
    known = [Demonstration(ids.astype(np.int32), np.array([i, END], np.int32)) for i, ids in enumerate(rows)]
    found = Sft(lesson._policy, lesson._packing, lesson._ranks, lesson._config, known, seed=0)
    flat = trainer._step.flatten(batch)
    assert [row for row, _ in found._of_batch(flat)] == [1, 2]
    every = lesson._config.model_copy(update={"choose": "batch"})
    of_all = Sft(lesson._policy, lesson._packing, lesson._ranks, every, known, seed=0)
    assert [*of_all._of_batch(flat)] == [(0, 1.5), (1, 1.75), (2, 1.75)]
    in_segments = replace(flat, members=np.repeat(np.arange(8), [1, 3] * 4))
    assert [*of_all._of_batch(in_segments)] == [(0, 1.0), (1, 1.5), (2, 1.5)]
    # Also where nothing of a response is trained on, whose beginning was certain.
    flat = replace(
        flat, loss_mask=np.zeros_like(flat.loss_mask), behavior_logprobs=0 * flat.behavior_logprobs
    )
    assert [row for row, _ in found._of_batch(flat)] == [1, 2]
    assert trainer.step(batch).get("sft/loss") is None  # its own rows are for other prompts
