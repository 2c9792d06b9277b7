"""What advantages and the bonus for entropy ask the step for: greedy responses, uncertainty, a target."""

import itertools

import numpy as np
import pytest
import torch
from batches import kept_table, make_batch, with_kept_sets, with_true_logprobs

from asyncrl.core.kept import KeptSets
from asyncrl.core.records import LeftOut
from asyncrl.objective.gae import Steps
from asyncrl.objective.otb import otb
from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.kernels.logprob import LogitShape
from asyncrl.trainer.lessons.score_norms import sum_of_squares
from asyncrl.trainer.models.policy import FusedHead
from asyncrl.trainer.packing.batch import BatchError


@pytest.fixture
def make(make_qwen3, save_model, make_config):
    path = save_model(make_qwen3())

    def make(objective, rollout=None, **trainer):
        sections = {"objective": objective, "rollout": rollout or {}}
        return make_trainer(
            make_config(path, run={"steps": 10}, trainer={"lr": 1e-3, "eps": 1e-4, **trainer}, **sections)
        )

    return make


@pytest.fixture
def batch(make_qwen3):
    return with_true_logprobs(with_kept_sets(make_batch(0)), make_qwen3())


def weights(trainer):
    return torch.cat([t.detach().flatten() for t in trainer.weights().values()])


@pytest.mark.parametrize("cut", [False, True])
def test_the_sum_of_squared_probabilities_is_over_the_vocabulary_that_a_token_was_sampled_among(cut):
    rng = torch.Generator().manual_seed(5)
    linear = torch.nn.Linear(6, 23, dtype=torch.float64)
    torch.nn.init.normal_(linear.weight, generator=rng)
    head = FusedHead(linear, LogitShape(0.5, 3.0), temperature=0.7, chunk_tokens=4)
    hidden = torch.randn(11, 6, generator=rng, dtype=torch.float64)
    kept = KeptSets.of([[0, 3, 7], [~2, ~5], *[[]] * 9]) if cut else None
    logits = head.shape(linear(hidden)) / 0.7
    if cut:
        logits = logits.masked_fill(~kept_table(kept, 23), -torch.inf)
    torch.testing.assert_close(sum_of_squares(hidden, head, kept), logits.softmax(-1).square().sum(-1))


def baselines_of_places(batch, model):
    """The advantage of every sampled token by its formula, one place of a group after the other."""
    found = []
    for group in batch.groups:
        so_far = []  # of each response
        for t in group.trajectories:
            ids = torch.from_numpy(t.token_ids).long()
            logits = model(input_ids=ids[None]).logits[0, :-1].detach().double()
            if t.kept is not None:
                logits.masked_fill_(~kept_table(t.kept)[1:], -torch.inf)
            p = logits.softmax(-1)
            norms = 1 - 2 * p.gather(-1, ids[1:, None])[:, 0] + p.square().sum(-1)
            so_far.append(norms[t.loss_mask[1:]].cumsum(0).tolist())
        rewards = [t.reward for t in group.trajectories]
        for own, reward in zip(so_far, rewards, strict=True):
            for place in range(len(own)):
                there = [(w[place], r) for w, r in zip(so_far, rewards, strict=True) if len(w) > place]
                found.append(reward - sum(w * r for w, r in there) / sum(w for w, _ in there))
    return np.array(found)


def test_the_step_computes_the_baseline_of_each_place_whatever_the_packing(make, batch, make_qwen3):
    expected = baselines_of_places(batch, make_qwen3())
    assert (np.abs(expected) < 1e-9).any(), "no place that a single response reaches"
    trained = []
    for settings in ({}, {"micro_batch_tokens": 1}):
        trainer = make({"advantage": "otb"}, mini_batches=2, **settings)
        metrics = trainer.step(batch)
        assert metrics["adv/mean"] == pytest.approx(expected.mean(), rel=1e-4)
        assert metrics["adv/std"] == pytest.approx(expected.std(), rel=1e-4)
        trained.append(weights(trainer))
    assert (trained[0] - trained[1]).norm() < 1e-5 * trained[0].norm()


def test_places_at_which_everybody_is_sure_have_the_mean_as_their_baseline():
    mask, sequences = torch.ones(5, dtype=torch.bool), torch.tensor([0, 0, 1, 1, 1])
    steps = Steps(torch.zeros(5), torch.tensor([1.0, 0.0]), sequences, mask)
    found = otb(steps, torch.zeros(5), torch.zeros(2, dtype=torch.int64))
    assert found.tolist() == [0.5, 0.5, -0.5, -0.5, 0.0]


def test_what_a_greedy_response_has_earned_is_taken_off_its_groups_rewards(make, batch):
    for i, group in enumerate(batch.groups):
        group.left_out = LeftOut(7, (0.25 * i,))
    expected = [
        t.reward - g.left_out.rewards[0]
        for g in batch.groups
        for t in g.trajectories
        for _ in range(t.loss_mask.sum())
    ]
    trainer = make({"advantage": "remax"}, {"choose": "greedy_baseline"})
    metrics = trainer.step(batch)
    assert metrics["adv/mean"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert metrics["adv/std"] == pytest.approx(np.std(expected), rel=1e-5)
    rewards = [t.reward for g in batch.groups for t in g.trajectories]
    assert metrics["reward/mean"] == pytest.approx(np.mean(rewards))
    batch.groups[2].left_out = LeftOut()
    with pytest.raises(BatchError, match=r"group 16 has the rewards \(\) .* there is one"):
        trainer.step(batch)


def test_the_bonus_for_entropy_follows_its_target_also_after_a_restart(make, batch, tmp_path):
    settings = {"entropy_coef": 0.025, "entropy_step": 0.01}
    below, above = (make({**settings, "entropy_target": target}) for target in (100.0, 1e-6))
    found = []
    for step in range(5):
        if step == 2:
            (tmp_path / "saved").mkdir()
            below.snapshot().write(tmp_path / "saved")
        found.append(below.step(batch)["entropy/coef"])
        assert above.step(batch)["entropy/coef"] == 0
    assert found == pytest.approx([0, 0.01, 0.02, 0.025, 0.025])

    again = make({**settings, "entropy_target": 100.0})
    again.restore(tmp_path / "saved")
    assert [again.step(batch)["entropy/coef"] for _ in range(3)] == found[2:]
    assert torch.equal(weights(again), weights(below))
    fixed = make({"entropy_coef": 0.02})
    fixed.restore(tmp_path / "saved")
    assert "entropy/coef" not in fixed.step(batch)
    third = make({**settings, "entropy_target": 100.0})
    third.restore(tmp_path / "saved")
    third.step(batch)
    assert torch.equal(weights(fixed), weights(third))
    lower, higher = (weights(x) for x in itertools.islice((above, below), 2))
    assert not torch.equal(lower, higher)
