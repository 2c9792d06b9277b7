"""Where a response was cut off, what the critic expects takes the place of its reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from asyncrl.config import Config
from asyncrl.trainer.critic.update import CriticUpdate
from asyncrl.trainer.packing.batch import FlatBatch
from asyncrl.trainer.packing.mini_batch import Packing, mini_batch
from asyncrl.trainer.ranks import Ranks


def make_bootstrap(
    config: Config, critic: CriticUpdate, packing: Packing, ranks: Ranks
) -> Callable[[FlatBatch], FlatBatch] | None:
    """None where a cut-off response keeps its reward."""
    if not config.objective.bootstrap_truncated:
        return None
    discount, max_length = config.objective.gamma or 1.0, config.rollout.max_new_tokens

    def bootstrapped(flat: FlatBatch) -> FlatBatch:
        ends = cut_ends(flat)
        mini = mini_batch(ends, np.arange(ends.sequences), packing, ranks, max_length)
        values = critic.values([mini], len(ends.token_ids))[ends.offsets[1:] - 1]
        members = np.arange(flat.sequences) if flat.members is None else flat.members
        cut = np.isin(members, members[flat.truncated])  # segments share what their member earns
        after = np.zeros(len(members))
        after[members[flat.truncated]] = discount * values.double().cpu().numpy()
        rewards = np.where(cut, after[members], flat.rewards)
        if flat.turn_rewards is None:
            return replace(flat, rewards=rewards)
        from asyncrl.trainer.turns import values_at_ends  # of episodes

        return replace(flat, rewards=rewards, turn_rewards=values_at_ends(flat, rewards, cut))

    return bootstrapped


def cut_ends(flat: FlatBatch) -> FlatBatch:
    """The sequences that were cut off, each with one more token, the only one of it in `loss_mask`: so what a
    critic says of that is V at the cut-off. (Which token it is makes no difference: no pass reads it.)"""
    at = np.flatnonzero(flat.truncated)
    spans = [np.arange(flat.offsets[s], flat.offsets[s + 1]) for s in at]
    tokens = np.concatenate([np.append(span, span[-1]) for span in spans])
    offsets = np.cumsum([0, *(len(span) + 1 for span in spans)])
    mask = np.zeros(len(tokens), dtype=np.bool_)
    mask[offsets[1:] - 1] = True
    names = ("token_ids", "sampled", "behavior_logprobs", "ages")
    of_tokens = {name: getattr(flat, name)[tokens] for name in names}
    of_sequences = {name: getattr(flat, name)[at] for name in ("group_ids", "rewards", "truncated")}
    return FlatBatch(**of_tokens, **of_sequences, loss_mask=mask, offsets=offsets)
