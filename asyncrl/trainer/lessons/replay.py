"""Rare successes of earlier steps, learnt from once more beside the samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.config import ReplayConfig
from asyncrl.core.kept import KeptSets
from asyncrl.objective.normalise import aggregate
from asyncrl.objective.policy import PolicyTokens, r_ratio
from asyncrl.objective.ppo import decoupled_ppo
from asyncrl.trainer.learner import Learner
from asyncrl.trainer.lesson import Lesson
from asyncrl.trainer.lessons.texts import prompt_of
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch, Packing, mini_batch
from asyncrl.trainer.ranks import Ranks
from asyncrl.trainer.state import SavedPart, Shapes

_OF_TOKENS = {
    "token_ids": np.int64,
    "loss_mask": np.bool_,
    "behavior_logprobs": np.float32,
    "ages": np.int64,
    "sampled": np.bool_,
}
_OF_SEQUENCES = {"rewards": np.float64, "truncated": np.bool_}
"""What is remembered of tokens and of sequences: arrays of a `FlatBatch`, with their dtypes."""
_INDICES = ("group_ids", "offsets")
_KIND = "rows"


class Replayed(NamedTuple):
    """group: of the batch, of whose row the successes are. baseline: the mean of its rewards."""

    group: int
    baseline: float
    successes: FlatBatch


class Replay(Lesson):
    """Adds to the loss of each mini-batch, for every group of it in which success is rare, what the row's
    last rare successes, had they been sampled in the group, would be with

        A = R - mean of the group's rewards,   loss = -sg(min(pi_theta / mu, ratio_cap)) · A · log pi_theta

    Each counts as one more response of the group: so with the whole ratio of a response in the place of its
    tokens', and with the failures that were beside it, this would be an unbiased estimate by the group that
    they come from. The baseline hangs on none of them, and is about what the failures would earn.

    They are off-policy data of any age, beside the batch and never in it: the bound on staleness is for what
    is in it. Which ones there are is a function of the batches so far, the same on all ranks; what is
    remembered is a part of checkpoints.

    Source: experience replay of successes, RLEP, Zhang et al. 2025 (arXiv 2507.07451), and ExGRPO, Zhan et
    al. 2025 (arXiv 2510.02245), which corrects by importance ratios; truncated, IMPALA, Espeholt et al. 2018
    (arXiv 1802.01561).
    """

    def __init__(
        self, policy: Learner, packing: Packing, ranks: Ranks, config: ReplayConfig, aggregation: str
    ) -> None:
        self._policy = policy
        self._packing = packing
        self._ranks = ranks
        self._config = config
        self._aggregation = aggregation
        self._memory = Memory(config.rows)
        self.parts = {"replay": self._memory}

    def begin(self, minis: Sequence[MiniBatch], flat: FlatBatch, tokens: TokenBatch, step: int) -> FlatBatch:
        self._flat, self._replayed = flat, list[Replayed]()
        self._sums = torch.zeros(3, dtype=torch.float64)
        remembered: dict[bytes, FlatBatch | None] = {}
        for group in np.unique(flat.group_ids):
            [sequences] = np.nonzero(flat.group_ids == group)
            prompt, rewards = prompt_of(flat, sequences[0]), flat.rewards[sequences]
            of_members = flat.rewards[np.intersect1d(sequences, flat.first_segments())]
            if (of_members > self._config.success_above).mean() > self._config.rare_below:
                remembered[prompt] = None
                continue
            if (known := self._memory.rows.get(prompt)) is not None:
                self._replayed.append(Replayed(int(group), float(of_members.mean()), _turned(known, step)))
            successes = _taken(flat, sequences[rewards > self._config.success_above])
            if successes.loss_mask.any():
                remembered[prompt_of(successes, 0)] = _turned(successes, step)
        for prompt, row in remembered.items():
            self._memory.put(prompt, row)
        return flat

    def add_gradient(self, mini: MiniBatch) -> None:
        groups = set(self._flat.group_ids[mini.sequences].tolist())
        chosen = [each for each in self._replayed if each.group in groups]
        if not chosen:
            return
        batch = _joined([each.successes for each in chosen])
        baselines = np.repeat([each.baseline for each in chosen], [e.successes.sequences for e in chosen])
        tokens = TokenBatch.of(batch, self._packing.device)
        advantages = torch.from_numpy(batch.rewards - baselines).float().to(tokens.ids.device)
        part = mini_batch(batch, np.arange(batch.sequences), self._packing, self._ranks, 1)
        for micro in part.micros():
            at = micro.token_index
            logprobs: Tensor = self._policy(micro, tokens.ids[at])[0]
            seen = PolicyTokens(
                logprobs=logprobs,
                prox_logprobs=logprobs.detach(),
                behavior_logprobs=tokens.behavior_logprobs[at],
                advantages=advantages[tokens.sequences[at]],
                mask=~logprobs.detach().isneginf(),
                sequences=tokens.sequences[at],
                ages=tokens.ages[at],
            )
            loss = self._config.coef * decoupled_ppo(seen, behavior_cap=self._config.ratio_cap).loss
            share = aggregate(self._aggregation, loss, seen.mask, seen.sequences, mini.totals)
            self._policy.backward(share)
            ratios = r_ratio(seen).detach()[seen.mask].double()
            sums = [len(at), float(seen.ages.sum()), float(ratios.sum())]
            self._sums += torch.tensor(sums, dtype=torch.float64)

    def metrics(self) -> dict[str, float]:
        tokens, ages, ratios = self._ranks.sum_on_host(self._sums.clone()).tolist()
        told = {
            "replay/rows": float(len(self._memory.rows)),
            "replay/groups": float(len(self._replayed)),
            "replay/tokens": tokens,
        }
        return told | ({"replay/age": ages / tokens, "replay/ratio": ratios / tokens} if tokens else {})


class Memory:
    """The last rare successes of each row, by `prompt_of`: no more than `most` rows. `Stateful`. Their `ages`
    are the versions that sampled them."""

    count = 0

    def __init__(self, most: int) -> None:
        self._most = most
        self.rows: dict[bytes, FlatBatch] = {}
        """In the order in which they came."""

    def put(self, prompt: bytes, successes: FlatBatch | None) -> None:
        """None forgets the row."""
        self.rows.pop(prompt, None)
        if successes is not None:
            self.rows[prompt] = successes
        while len(self.rows) > self._most:
            del self.rows[next(iter(self.rows))]

    def shapes(self) -> Shapes:
        return {}

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Of all rows, one after the other, under the names of `FlatBatch`."""
        held = _joined([*self.rows.values()])
        kept = held.kept or KeptSets(np.zeros(0, np.int32), np.zeros(len(held.token_ids), np.int32))
        arrays = {name: getattr(held, name) for name in (*_OF_TOKENS, *_OF_SEQUENCES, *_INDICES)}
        for name, array in (arrays | {"kept_ids": kept.ids, "kept_sizes": kept.sizes}).items():
            yield _KIND, name, torch.from_numpy(array)

    def offload(self) -> None:
        """It is on the host."""

    def reload(self) -> None: ...

    def load(self, saved: SavedPart) -> None:
        arrays = {name: saved(_KIND, name).numpy() for _, name, _ in self.tensors()}
        kept = KeptSets(arrays.pop("kept_ids"), arrays.pop("kept_sizes"))
        held = FlatBatch(**arrays, kept=kept if kept.sizes.any() else None)
        rows = [_taken(held, np.flatnonzero(held.group_ids == row)) for row in np.unique(held.group_ids)]
        self.rows = {prompt_of(row, 0): row for row in rows}


def _turned(flat: FlatBatch, step: int) -> FlatBatch:
    """With versions in the place of ages, or the other way round, in this step."""
    return replace(flat, ages=np.where(flat.sampled, step - flat.ages, 0))


def _taken(flat: FlatBatch, sequences: NDArray[np.int64]) -> FlatBatch:
    """These sequences of it."""
    spans = [np.arange(*flat.offsets[s : s + 2]) for s in sequences]
    tokens = np.concatenate([np.zeros(0, np.int64), *spans])
    return FlatBatch(
        **{name: getattr(flat, name)[tokens] for name in _OF_TOKENS},
        **{name: getattr(flat, name)[sequences] for name in _OF_SEQUENCES},
        group_ids=flat.group_ids[sequences],
        offsets=np.cumsum([0, *map(len, spans)], dtype=np.int64),
        kept=None if flat.kept is None else flat.kept.take(tokens),
    )


def _joined(parts: Sequence[FlatBatch]) -> FlatBatch:
    """Each is a group of its own, numbered from 0."""

    def joined(name: str, dtype: Any) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in parts)])

    lengths = [n for part in parts for n in np.diff(part.offsets)]
    return FlatBatch(
        **{name: joined(name, dtype) for name, dtype in (_OF_TOKENS | _OF_SEQUENCES).items()},
        group_ids=np.repeat(np.arange(len(parts)), [part.sequences for part in parts]),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        kept=KeptSets.join((part.kept, len(part.token_ids)) for part in parts),
    )
