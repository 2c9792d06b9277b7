"""A member of several segments counts as one: for advantages, rewards by turns, metrics, the wire."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import make_batch

from asyncrl.config import ObjectiveConfig
from asyncrl.core.records import Batch, Group, VersionSpan
from asyncrl.objective.catalogue import GROUP_ADVANTAGES
from asyncrl.trainer.advantages import AdvantageEstimator
from asyncrl.trainer.metrics import batch_metrics
from asyncrl.trainer.packing.batch import TokenBatch, flatten
from asyncrl.wire.codec import Malformed, check_group, decode_group, decode_header, encode_group


def split(trajectory):
    """The same trajectory with its second turn, if it has one, as a segment of its own: what was before it is
    that segment's prompt."""
    at = np.flatnonzero(np.diff(trajectory.loss_mask.astype(int)) == 1) + 1
    if len(at) < 2:
        return [trajectory]
    turn, end = int(at[1]), len(trajectory.token_ids)
    first = part(trajectory, 0, turn, end=turn)
    second = part(trajectory, turn, end, end=end)
    second.segment = 1
    second.metadata = {"split": "template"}
    return [first, second]


def part(t, begin, until, *, end):
    """Its tokens up to `end`, of which only those in `begin .. until` count as sampled."""
    here = (np.arange(end) >= begin) & (np.arange(end) < until) & t.loss_mask[:end]
    versions = t.token_versions()
    return replace(
        t,
        token_ids=t.token_ids[:end],
        loss_mask=here,
        behavior_logprobs=np.where(here, t.behavior_logprobs[:end], 0).astype(np.float32),
        versions=tuple(VersionSpan(i, 1, int(versions[i])) for i in np.flatnonzero(here).tolist()),
        turn_rewards=tuple((at, reward) for at, reward in t.turn_rewards if begin <= at < until),
        metadata={},
    )


def in_segments(batch):
    groups = [Group(g.group_id, g.row, [s for t in g.trajectories for s in split(t)]) for g in batch.groups]
    return Batch(batch.step, batch.version, batch.oldest_version, tuple(groups))


def estimate(batch, name, **inputs):
    """(advantages, targets) of the sampled tokens, in the order in which they were sampled."""
    flat = flatten(batch)
    sampled = torch.from_numpy(flat.loss_mask)
    tokens = TokenBatch.of(flat, torch.device("cpu"))
    given = {key: torch.zeros(len(sampled)).masked_scatter(sampled, value) for key, value in inputs.items()}
    advantages, targets = AdvantageEstimator(ObjectiveConfig(advantage=name))(
        flat, replace(tokens, **given), None
    )
    return advantages[sampled], None if targets is None else targets[sampled]


def sampled_count(batch):
    return int(flatten(batch).loss_mask.sum())


@pytest.mark.parametrize("name", sorted(GROUP_ADVANTAGES))
@pytest.mark.parametrize("seed", range(3))
def test_advantages_are_those_of_the_unsplit_member(name, seed):
    batch = make_batch(seed)
    for t in (t for group in batch.groups for t in group.trajectories):
        t.reward = float(t.reward > 0)  # some are for verified answers only
    assert len(in_segments(batch).groups[0].members()) == len(batch.groups[0].trajectories)
    assert sampled_count(in_segments(batch)) == sampled_count(batch)
    assert flatten(in_segments(batch)).sequences > flatten(batch).sequences
    start = torch.randn(sampled_count(batch), generator=torch.Generator().manual_seed(seed)) - 2
    whole, _ = estimate(batch, name, start_logprobs=start)
    parts, _ = estimate(in_segments(batch), name, start_logprobs=start)
    assert torch.equal(whole, parts) or torch.allclose(whole, parts, rtol=1e-5, atol=1e-6)


def with_turn_rewards(batch, seed=0):
    """A random reward for each turn, at its last token; the reward is their sum."""
    rng = np.random.default_rng(seed)
    for t in (t for group in batch.groups for t in group.trajectories):
        ends = np.flatnonzero(t.loss_mask & ~np.append(t.loss_mask[1:], False))
        t.turn_rewards = tuple((int(at), float(rng.normal())) for at in ends)
        t.reward = sum(reward for _, reward in t.turn_rewards)
    return batch


@pytest.mark.parametrize("segmented", [False, True])
def test_a_critic_is_taught_what_was_earned_from_each_turn_on(segmented):
    batch = with_turn_rewards(make_batch(1))
    expected = []
    for t in (t for group in batch.groups for t in group.trajectories):
        for at in np.flatnonzero(t.loss_mask):
            expected.append(sum(reward for end, reward in t.turn_rewards if end >= at))
    if segmented:
        batch = in_segments(batch)
        for group in batch.groups:  # a segment's turns hold all that was earned from the first of them on
            for first, *later in (m for m in group.members() if len(m) > 1):
                (at, reward), rest = first.turn_rewards[-1], sum(r for t in later for _, r in t.turn_rewards)
                first.turn_rewards = (*first.turn_rewards[:-1], (at, reward + rest))
    values = torch.randn(sampled_count(batch), generator=torch.Generator().manual_seed(0))
    _, targets = estimate(batch, "gae", values=values)
    torch.testing.assert_close(targets, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-4)


def test_metrics_count_a_member_once_and_tell_why_it_was_split():
    batch = make_batch(2)
    whole = dict(batch_metrics(batch, flatten(batch)))
    parts = dict(batch_metrics(in_segments(batch), flatten(in_segments(batch))))
    assert {key: parts[key] for key in whole} == whole
    members = [m for group in in_segments(batch).groups for m in group.members()]
    share = sum(len(m) > 1 for m in members) / len(members)
    assert parts["segments/mean"] == 1 + share
    assert parts["segments/split_frac/template"] == share > 0


def test_segments_cross_the_wire_and_count_once():
    group = in_segments(with_turn_rewards(make_batch(2))).groups[0]
    wire = encode_group(group, lease_id=0)
    check_group(decode_header(wire.header), wire.frames, 4)
    decoded = decode_group(wire.header, wire.frames)
    for key in ("segment", "turn_rewards", "metadata", "versions"):
        assert [getattr(t, key) for t in decoded.trajectories] == [
            getattr(t, key) for t in group.trajectories
        ]
    assert decoded.summary() == decode_header(wire.header).summary() == group.summary()
    assert len(group.summary().rewards) == 4 < len(group.trajectories)


def first_segment_of_two(group):
    return next(i for i, t in enumerate(group.trajectories) if t.segment == 1) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, i: setattr(g.trajectories[i + 1], "reward", 99.0), "does not follow"),
        (lambda g, i: setattr(g.trajectories[i + 1], "segment", 2), "does not follow"),
        (lambda g, i: setattr(g.trajectories[i + 1], "segment", 0), "has 5 members, not 4"),
        (lambda g, i: setattr(g.trajectories[i], "turn_rewards", ((0, 1.0),)), "were not sampled"),
        (lambda g, i: setattr(g.trajectories[i], "turn_rewards", ((2**40, 1.0),)), "were not sampled"),
    ],
)
def test_segments_that_contradict_each_other_are_refused(change, message):
    group = in_segments(make_batch(2)).groups[0]
    change(group, first_segment_of_two(group))
    wire = encode_group(group, lease_id=0)
    with pytest.raises(Malformed, match=message):
        check_group(decode_header(wire.header), wire.frames, 4)
