"""Advantages of turns against their formulas, turn by turn."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.objective.advantages import Outcomes, grpo
from asyncrl.objective.gae import Steps, gae
from asyncrl.objective.turns import Turns, turn_gae, turn_grpo


def random_turns(seed, members=12, group_size=4, most=5):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, most + 1, members)
    owner = np.repeat(np.arange(members), counts)
    numbers = np.concatenate([np.sort(rng.choice(most, n, replace=False)) for n in counts])
    return Turns(
        rewards=torch.from_numpy(rng.normal(size=len(owner))),
        members=torch.from_numpy(owner),
        group_ids=torch.from_numpy(7 + 3 * (owner // group_size)),
        numbers=torch.from_numpy(numbers),
        lengths=torch.from_numpy(rng.integers(1, 9, len(owner))),
        values=torch.from_numpy(rng.normal(size=len(owner))),
    )


def of_members(turns):
    """The places of each member's turns."""
    return [np.flatnonzero(turns.members == m) for m in turns.members.unique()]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (0.5, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_turn_gae_is_the_textbooks_sum_over_turns(gamma, lam, seed):
    turns = random_turns(seed)
    advantages, targets = turn_gae(turns, gamma=gamma, lam=lam)
    for at in of_members(turns):
        rewards, values = turns.rewards[at].numpy(), np.append(turns.values[at], 0.0)
        delta = rewards + gamma * values[1:] - values[:-1]
        for k, i in enumerate(at):
            expected = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(at)))
            np.testing.assert_allclose(advantages[i], expected, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(targets[i], values[k] + expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("gamma", "ddof"), [(1.0, 0), (0.7, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_turn_grpo_compares_the_returns_of_the_same_turn(gamma, ddof, seed):
    turns = random_turns(seed)
    found = turn_grpo(turns, gamma=gamma, deviation="sample" if ddof else "population")
    returns = np.zeros(len(found))
    for at in of_members(turns):
        for k, i in enumerate(at):
            returns[i] = sum(gamma ** (j - k) * turns.rewards[at[j]] for j in range(k, len(at)))
    for group in turns.group_ids.unique():
        for number in turns.numbers.unique():
            same = np.flatnonzero((turns.group_ids == group) & (turns.numbers == number))
            r = returns[same]
            expected = (r - r.mean()) / r.std(ddof=ddof) if len(r) > 1 else np.zeros(len(r))
            np.testing.assert_allclose(found[same], expected, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 999))
def test_members_of_one_turn_are_compared_as_by_grpo_and_valued_as_one_step(seed):
    turns = random_turns(seed, most=1)
    outcomes = Outcomes(turns.rewards, turns.group_ids, turns.lengths)
    torch.testing.assert_close(turn_grpo(turns, gamma=0.3), grpo(outcomes))
    advantages, _ = turn_gae(turns, gamma=0.3, lam=0.2)
    torch.testing.assert_close(advantages, turns.rewards - turns.values)


def test_what_came_before_a_turn_changes_nothing_of_it():
    turns = random_turns(1)
    firsts = torch.tensor([at[0] for at in of_members(turns)])
    before = turn_gae(turns)[0], turn_grpo(turns)
    turns.rewards[firsts] += torch.arange(len(firsts))
    after = turn_gae(turns)[0], turn_grpo(turns)
    first_numbers = {(int(turns.group_ids[i]), int(turns.numbers[i])) for i in firsts}
    later = [
        i
        for i in range(len(turns.rewards))
        if i not in firsts and (int(turns.group_ids[i]), int(turns.numbers[i])) not in first_numbers
    ]
    assert later
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a[later], b[later])
        assert not torch.allclose(a[firsts], b[firsts])


def test_a_discount_is_by_turns_and_not_by_tokens():
    """Whatever a turn's length, the one after it is discounted once; by tokens the first would fade away."""
    turns = Turns(
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        *(torch.tensor([0, 0]), torch.tensor([3, 3]), torch.tensor([0, 1]), torch.tensor([500, 2])),
        torch.zeros(2, dtype=torch.float64),
    )
    assert turn_gae(turns, gamma=0.9)[0].tolist() == [0.9, 1.0]
    tokens = Steps(
        torch.zeros(502, dtype=torch.float64), torch.ones(1), torch.zeros(502).long(), torch.ones(502) > 0
    )
    assert gae(tokens, gamma=0.9)[0][0] < 1e-20
