"""Demonstrations beside samples: supervised learning in the steps of reinforcement learning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.config import SftConfig
from asyncrl.data.demonstrations import Demonstration
from asyncrl.trainer.learner import Learner
from asyncrl.trainer.lesson import Lesson
from asyncrl.trainer.lessons.texts import Text, prompt_of, text_batch
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch, Packing, mini_batch
from asyncrl.trainer.ranks import Ranks


class Sft(Lesson):
    """Adds to the loss of each mini-batch, in every n-th step,

        coef · mean over the tokens of its demonstrations of -log pi_theta(token)

    Which rows a step has is a function of the step and of `run.seed`: all of them in an order of each epoch's
    own, so that a run that goes on from a checkpoint neither repeats nor skips one. (A step of which all is
    masked has no update; its rows come again in the next epoch.)

    With `choose: batch` or `failed` it is of the batch alone: the rows of its prompts, or of those that no
    response has answered. With `loss: rl_plus` that takes the place of -log pi_theta, by the advantage that
    a demonstration of reward 1 has over its prompt's group (1 with `choose: all`).

    Source: for the questions that fail, ReLIFT, Ma et al. 2025 (arXiv 2506.07527), which collects them for
    updates of their own; in one loss, CHORD, Zhang et al. 2025 (arXiv 2508.11408).
    """

    def __init__(
        self,
        policy: Learner,
        packing: Packing,
        ranks: Ranks,
        config: SftConfig,
        demonstrations: Sequence[Demonstration],
        seed: int,
    ) -> None:
        self._policy = policy
        self._packing = packing
        self._ranks = ranks
        self._config = config
        self._demonstrations = demonstrations
        self._seed = seed
        self._by_prompt = {
            row.prompt_ids.astype(np.int64).tobytes(): i for i, row in enumerate(demonstrations)
        }

    def begin(self, minis: Sequence[MiniBatch], flat: FlatBatch, tokens: TokenBatch, step: int) -> FlatBatch:
        every, chosen = self._config.every_steps, list[tuple[int, float]]()
        if (step + 1) % every == 0 and self._config.choose != "all":
            chosen = [*self._of_batch(flat)][: self._config.rows]
        elif (step + 1) % every == 0:
            rows = rows_of(step // every, self._config.rows, len(self._demonstrations), self._seed)
            chosen = [(row, 1.0) for row in rows.tolist()]
        parts = np.array_split(np.arange(len(chosen)), len(minis))
        self._parts = iter([[chosen[i] for i in part] for part in parts])
        self._sums = torch.zeros(2, dtype=torch.float64)
        return flat

    def _of_batch(self, flat: FlatBatch) -> Iterator[tuple[int, float]]:
        """Rows with the prompt of a group (of one without a reward above 0, where these are asked for), and
        what a reward of 1 is more than the group's mean."""
        firsts = flat.first_segments()
        for group in np.unique(flat.group_ids):
            members = firsts[flat.group_ids[firsts] == group]
            row, rewards = self._by_prompt.get(prompt_of(flat, members[0])), flat.rewards[members]
            if row is not None and (self._config.choose == "batch" or (rewards <= 0).all()):
                yield row, 1 - float(rewards.mean())

    def add_gradient(self, mini: MiniBatch) -> None:
        chosen = next(self._parts)
        texts = text_batch(
            [Text(*self._demonstrations[row], group_id=i) for i, (row, _) in enumerate(chosen)]
        )
        if texts is None:
            return
        device = self._packing.device
        ids, index = torch.from_numpy(texts.token_ids).to(device), texts.sequence_index().to(device)
        advantages = torch.tensor([advantage for _, advantage in chosen], device=device)
        part = mini_batch(texts, np.arange(texts.sequences), self._packing, self._ranks, 1)
        for micro in part.micros():
            at = micro.token_index
            logprobs: Tensor = self._policy(micro, ids[at])[0]
            is_plain = self._config.loss == "likelihood"
            loss = -logprobs if is_plain else rl_plus(logprobs, advantages[index[at]])
            self._policy.backward(self._config.coef / part.totals.tokens * loss.sum())
            self._sums += torch.tensor([-float(logprobs.detach().sum()), len(logprobs)], dtype=torch.float64)

    def metrics(self) -> dict[str, float]:
        loss, tokens = self._ranks.sum_on_host(self._sums.clone()).tolist()
        return {"sft/loss": loss / tokens, "sft/tokens": tokens} if tokens else {}


def rl_plus(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """float[N]: the loss of demonstrated tokens, from log pi_theta and the advantage of each one's text,

        loss = -A·sqrt(1 - pi)·2·pi_theta / (pi + omega),   pi = sg(pi_theta), omega = (pi + 1) / 2

    omega stands for the policy that wrote them, of which nothing is known: half the policy itself, half one
    that is sure of the token. pi is the policy as it is before the update.

    Source: RL-PLUS, Dong et al. 2025 (arXiv 2508.00222); the root is that of its implementation.
    """
    before = logprobs.detach().exp()
    ratios = 2 * logprobs.exp() / (before + (before + 1) / 2)
    return -advantages * (1 - before).clamp(min=0).sqrt() * ratios


def rows_of(turn: int, number: int, rows: int, seed: int) -> NDArray[np.int64]:
    """int64[number]: which of so many `rows` the `turn` (from 0) has, of turns of `number` each."""
    at = turn * number + np.arange(number)
    epochs = {epoch: np.random.default_rng([seed, epoch]).permutation(rows) for epoch in set(at // rows)}
    return np.array([epochs[epoch][i] for epoch, i in zip(at // rows, at % rows, strict=True)], np.int64)
