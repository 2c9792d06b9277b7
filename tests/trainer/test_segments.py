"""A member of several segments counts as one: for advantages, rewards by turns, metrics, the wire."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from batches import make_batch
from forked import run_ranks

from asyncrl.config import ObjectiveConfig
from asyncrl.core.records import Batch, FinishReason, Group, VersionSpan
from asyncrl.objective.catalogue import GROUP_ADVANTAGES, TURN_ADVANTAGES
from asyncrl.trainer.advantages import AdvantageEstimator
from asyncrl.trainer.backends.deepspeed.group import RankGroup
from asyncrl.trainer.metrics import batch_metrics
from asyncrl.trainer.packing.batch import TokenBatch, flatten
from asyncrl.wire.codec import Malformed, check_group, decode_group, encode_group


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
    turns = [i for i, (_, last) in enumerate(t.turns) if begin <= last < until]
    return replace(
        t,
        turns=tuple(t.turns[i] for i in turns),
        turn_parts={name: tuple(values[i] for i in turns) for name, values in t.turn_parts.items()},
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
    flat = replace(flat, baselines=np.cos(flat.group_ids))
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
        t.turns = tuple(enumerate(ends.tolist()))
        t.turn_parts = {"accuracy": tuple(rng.normal(size=len(ends)).tolist())}
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


@pytest.mark.parametrize("name", sorted(TURN_ADVANTAGES))
@pytest.mark.parametrize("seed", range(4))
def test_turns_of_members_are_those_of_the_unsplit_member_in_whatever_segments_they_are(seed, name):
    """Turns dealt to segments at random, as branches and rewritten histories do; some members have earned by
    turns, some in all, and some have made one request only."""
    rng = np.random.default_rng(seed)
    batch, dealt = make_batch(seed), []
    for group in batch.groups:
        segments = []
        for t in group.trajectories:
            with_turns(t, rng)
            segments += deal(t, rng)
        dealt.append(Group(group.group_id, group.row, segments))
    parts = replace(batch, groups=tuple(dealt))
    assert flatten(parts).sequences > flatten(batch).sequences
    settings = {"gamma": 0.9, **({"lam": 0.8} if name == "turn_gae" else {})}
    per_token = {"values": rng.normal(size=sampled_count(batch)), "kl": rng.normal(size=sampled_count(batch))}
    found = [estimate_by_turn(b, name, settings, per_token) for b in (batch, parts)]
    for whole, split_up in zip(*found, strict=True):
        if whole is not None:
            torch.testing.assert_close(split_up, whole, rtol=1e-4, atol=1e-4)
    assert (found[0][1] is None) == (name == "turn_grpo")
    assert len(found[0][0].unique()) > len(batch.groups), "turns of a member differ"


def with_turns(t, rng):
    """Cuts the sampled tokens of a trajectory into turns, of which some requests are not trained on."""
    at = np.flatnonzero(t.loss_mask)
    ends = sorted({int(at[-1]), *(int(i) for i in rng.choice(at, min(len(at), int(rng.integers(0, 4)))))})
    numbers = np.sort(rng.choice(5, len(ends), replace=False)).tolist()
    if len(ends) > 1:
        t.turns = tuple(zip(numbers, ends, strict=True))
    if len(ends) > 1 and rng.random() < 0.7:
        earned = [*rng.normal(size=5)]
        t.reward = float(sum(earned))
        t.turn_rewards = tuple(
            (end, float(sum(earned[n:m]))) for (n, end), m in zip(t.turns, [*numbers[1:], 5], strict=True)
        )


def deal(t, rng):
    """Its turns in up to three segments, as sequences of the same tokens of which each trains its own."""
    owners = rng.integers(0, 3, max(1, len(t.turns)))
    turns = t.turns or ((0, len(t.token_ids) - 1),)
    versions, segments, begin = t.token_versions(), [], 0
    spans = []
    for _, end in turns:
        spans.append((begin, end + 1))
        begin = end + 1
    to_go = np.cumsum([reward for _, reward in t.turn_rewards][::-1])[::-1]
    for owner in dict.fromkeys(owners.tolist()):
        mine = np.flatnonzero(owners == owner)
        here = np.zeros(len(t.token_ids), bool)
        for i in mine:
            here[slice(*spans[i])] = t.loss_mask[slice(*spans[i])]
        rewards = (
            [
                to_go[i] - (to_go[j] if j is not None else 0.0)
                for i, j in zip(mine, [*mine[1:], None], strict=True)
            ]
            if len(to_go)
            else []
        )
        segments.append(
            replace(
                t,
                loss_mask=here,
                behavior_logprobs=np.where(here, t.behavior_logprobs, 0).astype(np.float32),
                versions=tuple(VersionSpan(i, 1, int(versions[i])) for i in np.flatnonzero(here).tolist()),
                segment=len(segments),
                turns=tuple(t.turns[i] for i in mine) if t.turns else (),
                turn_rewards=tuple((t.turns[i][1], float(r)) for i, r in zip(mine, rewards, strict=False)),
            )
        )
    return segments


def estimate_by_turn(batch, name, settings, per_token):
    """(advantages, targets) of the sampled tokens in the order of the unsplit member's."""
    flat = flatten(batch)
    sampled = torch.from_numpy(flat.loss_mask)
    members = flat.members if flat.members is not None else np.arange(flat.sequences)
    position = np.arange(len(sampled)) - np.repeat(flat.offsets[:-1], np.diff(flat.offsets))
    order = np.lexsort((position[sampled], np.repeat(members, np.diff(flat.offsets))[sampled]))
    at = torch.from_numpy(np.flatnonzero(sampled)[order])

    def over_all(values):
        return torch.zeros(len(sampled)).index_copy(0, at, torch.from_numpy(values).float())

    tokens = replace(TokenBatch.of(flat, torch.device("cpu")), values=over_all(per_token["values"]))
    estimator = AdvantageEstimator(ObjectiveConfig(advantage=name, **settings))
    found = estimator(flat, tokens, over_all(per_token["kl"]))
    return [None if x is None else x[at] for x in found]


def test_a_member_of_which_a_segment_was_cut_off_is_left_out_as_a_whole():
    batch = in_segments(make_batch(2))
    members = [m for group in batch.groups for m in group.members()]
    for member in members:
        for t in member:
            t.finish_reason = FinishReason.STOP
    first, last = [m for m in members if len(m) > 1][:2]
    first[0].finish_reason = last[-1].finish_reason = FinishReason.LENGTH
    cut = [t is s for group in batch.groups for t in group.trajectories for s in (*first, *last)]
    left_out = np.array(cut).reshape(-1, len(first) + len(last)).any(1)
    whole, masked = flatten(batch), flatten(batch, mask_truncated=True)
    np.testing.assert_array_equal(masked.loss_mask, whole.loss_mask & ~left_out[whole.sequence_index()])
    assert masked.truncated.tolist() == [t is last[-1] for g in batch.groups for t in g.trajectories]


def flat_batches():
    """Without segments and turns, with segments, and with both."""
    plain, by_turns = make_batch(1), with_turn_rewards(make_batch(1))
    return [flatten(b) for b in (plain, in_segments(plain), in_segments(by_turns))]


def take_part(rank, folder):
    group = RankGroup(rank, 2, folder / "rendezvous", torch.device("cpu"), start_timeout_s=60.0)
    for flat in flat_batches():
        got = group._broadcast_batch(flat if rank == 0 else None)
        for field in fields(flat):
            np.testing.assert_array_equal(getattr(got, field.name), getattr(flat, field.name), field.name)
    group.close()


@pytest.mark.slow
@pytest.mark.deepspeed
def test_ranks_get_the_segments_and_turns_that_rank_0_has(tmp_path):
    assert [flat.turns is None for flat in flat_batches()] == [True, True, False]
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    run_ranks(take_part, tmp_path, logs=logs, deadline_s=120.0)


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
    header, decoded = check_group(wire, 4), decode_group(wire)
    for key in ("segment", "turns", "turn_parts", "turn_rewards", "metadata", "versions"):
        assert [getattr(t, key) for t in decoded.trajectories] == [
            getattr(t, key) for t in group.trajectories
        ]
    assert decoded.summary() == header.summary() == group.summary()
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
        (lambda g, i: setattr(g.trajectories[i], "turns", ((1, 0),)), "were not sampled"),
        *(
            (
                lambda g, i, parts=parts: setattr(g.trajectories[i], "turn_parts", parts),
                "of 0 turns has the parts",
            )
            for parts in ({"accuracy": (1.0,)}, {"accuracy": ()}, {"other": ()})
        ),
    ],
)
def test_segments_that_contradict_each_other_are_refused(change, message):
    group = in_segments(make_batch(2)).groups[0]
    change(group, first_segment_of_two(group))
    wire = encode_group(group, lease_id=0)
    with pytest.raises(Malformed, match=message):
        check_group(wire, 4)
