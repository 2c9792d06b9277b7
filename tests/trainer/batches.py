"""Batches of random ragged trajectories."""

import numpy as np
import torch

from asyncrl.core.kept import KeptSets
from asyncrl.core.records import Batch, FinishReason, Group, Trajectory, VersionSpan

VOCABULARY = 97


def make_trajectory(rng, *, prompt=None, versions=(0, 3), max_response=14, vocabulary=VOCABULARY):
    """Prompt, response, sometimes a tool's output and a second response; token versions never fall."""
    prompt = rng.integers(2, vocabulary, rng.integers(1, 9)) if prompt is None else prompt
    turns = [(True, rng.integers(1, max_response))]
    if rng.random() < 0.3:
        turns += [(False, rng.integers(1, 4)), (True, rng.integers(1, 5))]
    mask = np.concatenate([np.zeros(len(prompt), bool), *[np.full(n, sampled) for sampled, n in turns]])
    token_ids = np.concatenate([prompt, rng.integers(2, vocabulary, len(mask) - len(prompt))])
    at = np.flatnonzero(mask)
    stamped = np.sort(rng.integers(versions[0], versions[1] + 1, len(at)))
    spans = []
    for t, version in zip(at.tolist(), stamped.tolist(), strict=True):
        if spans and spans[-1].version == version and spans[-1].start + spans[-1].length == t:
            spans[-1] = VersionSpan(spans[-1].start, spans[-1].length + 1, version)
        else:
            spans.append(VersionSpan(t, 1, version))
    return Trajectory(
        token_ids=token_ids.astype(np.int32),
        loss_mask=mask,
        behavior_logprobs=np.where(mask, -rng.exponential(2.0, len(mask)), 0).astype(np.float32),
        versions=tuple(spans),
        finish_reason=FinishReason.STOP if rng.random() < 0.7 else FinishReason.LENGTH,
        reward=float(rng.normal()),
        reward_parts={"accuracy": float(rng.integers(0, 2))},
    )


def make_batch(seed=0, *, groups=4, group_size=4, step=3, version=3, oldest_version=0, **kwargs):
    rng = np.random.default_rng(seed)
    made = []
    for g in range(groups):
        prompt = rng.integers(2, kwargs.get("vocabulary", VOCABULARY), rng.integers(1, 9))
        trajectories = [
            make_trajectory(rng, prompt=prompt, versions=(0, version), **kwargs) for _ in range(group_size)
        ]
        made.append(Group(group_id=10 + 3 * g, row=g, trajectories=trajectories))
    return Batch(step=step, version=version, oldest_version=oldest_version, groups=tuple(made))


def with_true_logprobs(batch, model, noise=0.3, seed=0):
    """The batch with behaviour logprobs near the model's own, as an engine a few versions back gives them."""
    rng = np.random.default_rng(seed)
    for group in batch.groups:
        for t in group.trajectories:
            logits = model(input_ids=torch.from_numpy(t.token_ids).long()[None]).logits[0, :-1].detach()
            own = logits.log_softmax(-1).gather(-1, torch.from_numpy(t.token_ids[1:]).long()[:, None])[:, 0]
            noisy = np.concatenate([[0], own.numpy()]) + rng.normal(0, noise, len(t.token_ids))
            t.behavior_logprobs = np.where(t.loss_mask, noisy, 0).astype(np.float32)
    return batch


def with_kept_sets(batch, seed=0, vocabulary=VOCABULARY):
    """The batch with kept sets: most tokens were sampled among few, some among many, some among all."""
    rng = np.random.default_rng(seed)
    for group in batch.groups:
        for t in group.trajectories:
            sets = [np.empty(0, np.int32)] * len(t.token_ids)
            for at in np.flatnonzero(t.loss_mask):
                kept = rng.random(vocabulary) < rng.choice([0.1, 0.95])
                kept[t.token_ids[at]] = True
                kind = rng.integers(3)
                sets[at] = [np.flatnonzero(kept), ~np.flatnonzero(~kept), sets[at]][kind].astype(np.int32)
            t.kept = KeptSets.of(sets)
    return batch


def with_references(batch, seed=0, vocabulary=VOCABULARY):
    """The batch with what a worker notes of responses that come to an answer: most of them, and of one group
    none."""
    rng = np.random.default_rng(seed)
    for group in batch.groups[1:]:
        answer, mark = (rng.integers(2, vocabulary, n).tolist() for n in (rng.integers(1, 4), 2))
        for t in group.trajectories:
            if rng.random() < 0.7:
                kept = int(rng.integers(t.loss_mask.argmax(), len(t.token_ids) + 1))
                t.metadata["reference"] = {"kept": kept, "tail": mark[1:], "answer": answer, "mark": mark}
    return batch


def kept_table(kept, vocabulary=VOCABULARY):
    """bool[N, V], by the definition of `KeptSets`."""
    table = torch.ones(len(kept.sizes), vocabulary, dtype=torch.bool)
    for row, ids in zip(table, np.split(kept.ids, np.cumsum(kept.sizes)[:-1]), strict=True):
        if len(ids):
            row[:] = bool(ids[0] < 0)
            row[torch.from_numpy(np.where(ids < 0, ~ids, ids)).long()] = not ids[0] < 0
    return table
