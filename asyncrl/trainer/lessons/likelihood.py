"""The policy's own probability of a reference answer, after its thinking, as a reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.config import LikelihoodConfig
from asyncrl.core.records import Batch
from asyncrl.reward.likelihood import Reference
from asyncrl.trainer.learner import Learner
from asyncrl.trainer.lesson import Lesson
from asyncrl.trainer.lessons.texts import Text, text_batch
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch, Packing, batch_logprobs, mini_batch
from asyncrl.trainer.ranks import Ranks

DIRECT = -1
"""As a text's member: the answer right after the prompt."""


def likelihoods(logprobs: Tensor, texts: Tensor, number: int, form: str) -> Tensor:
    """float64[S]: what `number` answers are worth, by log p (float[N]) of their tokens; texts: int64[N], the
    answer that each is of.

        mean      sum_k p_k / n
        product   prod_k p_k

    Source: `mean`, RLPR, Yu et al. 2025 (arXiv 2506.18254), section 2.2, where one improbable token does not
    spoil an answer; `product`, VeriFree, Zhou et al. 2025 (arXiv 2505.21493).
    """
    zeros = torch.zeros(number, dtype=torch.float64, device=logprobs.device)
    precise = logprobs.double()
    if form == "product":
        return zeros.index_add(0, texts, precise).exp()
    counts = zeros.index_add(0, texts, torch.ones_like(precise))
    return zeros.index_add(0, texts, precise.exp()) / counts.clamp(min=1)


def debiased(values: Tensor, direct: Tensor) -> Tensor:
    """min(max(value - direct, 0), 1): what thinking adds to the answer's worth right after the prompt.

    Source: RLPR, section 2.3.
    """
    return (values - direct).clamp(0, 1)


class Likelihood(Lesson):
    """Adds weight · R to each member's reward, R by the policy as it is at the step's start:

        mean      R = min(max(mean_k p_k - the same without thinking, 0), 1)
        product   R = pi(answer | prompt, thinking)

    and 0 where a response has not come to an answer. The gradient of E[R] has a second part where R is the
    product, R · grad log pi(answer | prompt, thinking), which is added to the policy's own. A response weighs
    in it what it weighs in the loss (where all of it is masked, nothing); with an advantage and an
    aggregation that do not rescale (`rloo`, `constant_length`) the sum is unbiased on fresh samples.
    """

    def __init__(
        self, policy: Learner, packing: Packing, ranks: Ranks, config: LikelihoodConfig, aggregation: str
    ) -> None:
        self._policy = policy
        self._packing = packing
        self._ranks = ranks
        self._config = config
        self._aggregation = aggregation

    def flatten(self, batch: Batch, flat: FlatBatch) -> FlatBatch:
        return replace(flat, texts=text_batch(list(self._texts(batch))))

    def _texts(self, batch: Batch) -> Iterator[Text]:
        """In the order of the flat batch's members."""
        member = 0
        for group in sorted(batch.groups, key=lambda group: group.group_id):
            found = None
            for *_, last in group.members():
                if (noted := last.metadata.get("reference")) is not None:
                    found = Reference(**noted)
                    before = [*last.token_ids[: found.kept].tolist(), *found.tail]
                    yield Text(before, found.answer, group.group_id, member)
                member += 1
            if found is not None and self._config.form == "mean":
                prompt = last.token_ids[: int(last.loss_mask.argmax())].tolist()
                yield Text([*prompt, *found.mark], found.answer, group.group_id, DIRECT)

    def begin(self, minis: Sequence[MiniBatch], flat: FlatBatch, tokens: TokenBatch, step: int) -> FlatBatch:
        self._flat, texts = flat, flat.texts
        firsts = flat.first_segments()
        earned = np.zeros(len(firsts))
        self._metrics = {"likelihood/unanswered_frac": 1.0}
        if texts is not None:
            values, direct = self._values(texts, tokens.ids.device)
            of_members = texts.members != DIRECT
            self._worth = values
            earned[texts.members[of_members]] = debiased(values, direct)[torch.from_numpy(of_members)]
            self._metrics = {
                "likelihood/unanswered_frac": 1 - float(of_members.sum()) / len(firsts),
                "likelihood/answer": float(values[torch.from_numpy(of_members)].mean()),
            }
            if self._config.form == "mean":
                self._metrics["likelihood/direct"] = float(values[torch.from_numpy(~of_members)].mean())
        members = np.arange(flat.sequences) if flat.members is None else flat.members
        gain = self._config.weight * earned
        rewards = flat.rewards + gain[members]
        self._metrics |= {
            "likelihood/mean": float(earned.mean()),
            "reward/mean": float(rewards[firsts].mean()),
            "reward/std": float(rewards[firsts].std()),
        }
        return replace(flat, rewards=rewards, turn_rewards=_at_the_ends(flat, gain))

    def _values(self, texts: FlatBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """float64[S] each: of every text, and of what its group's is without thinking (0 where there is
        none)."""
        everything = np.arange(texts.sequences)
        mini = mini_batch(texts, everything, self._packing, self._ranks, 1)
        ids = torch.from_numpy(texts.token_ids).to(device)
        logprobs = batch_logprobs(self._policy, [mini], ids, self._ranks).cpu()
        answers = torch.from_numpy(texts.loss_mask)
        index = texts.sequence_index()[answers]
        values = likelihoods(logprobs[answers], index, texts.sequences, self._config.form)
        direct = torch.zeros_like(values)
        for s in np.flatnonzero(texts.members == DIRECT):
            direct[torch.from_numpy(texts.group_ids == texts.group_ids[s])] = values[s]
        return values, direct

    def add_gradient(self, mini: MiniBatch) -> None:
        texts = self._flat.texts
        if self._config.form == "mean" or texts is None:
            return
        trained = mini.sequences[self._flat.trained_lengths()[mini.sequences] > 0]
        members = trained if self._flat.members is None else self._flat.members[trained]
        chosen = np.flatnonzero(np.isin(texts.members, members))
        if not len(chosen):
            return
        totals = mini.totals
        divisor = {
            "token_mean": totals.tokens,
            "sequence_mean": totals.sequences,
            "constant_length": totals.sequences * totals.max_length,
        }[self._aggregation]
        index = texts.sequence_index()
        weights = self._config.weight / divisor * self._worth[index].float()
        ids = torch.from_numpy(texts.token_ids).to(self._packing.device)
        weights = weights.to(ids.device)
        for micro in mini_batch(texts, chosen, self._packing, self._ranks, 1).micros():
            logprobs, _ = self._policy(micro, ids[micro.token_index])
            self._policy.backward(-(weights[micro.token_index] * logprobs).sum())

    def metrics(self) -> dict[str, float]:
        return self._metrics


def _at_the_ends(flat: FlatBatch, gain: NDArray[np.float64]) -> NDArray[np.float32] | None:
    """Where rewards are given at turns: each member's `gain` at the last token that it has sampled."""
    if flat.turn_rewards is None:
        return None
    given = flat.turn_rewards.copy()
    members = np.arange(flat.sequences) if flat.members is None else flat.members
    index = members[np.repeat(np.arange(flat.sequences), np.diff(flat.offsets))]
    for member in np.unique(index[flat.loss_mask]):
        given[np.flatnonzero(flat.loss_mask & (index == member))[-1]] += gain[member]
    return given
