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
    own, so that a run that goes on from a checkpoint neither repeats nor skips one.

    With `choose: failed` it is of the batch alone: the rows whose prompts no response has answered.

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
        every, rows = self._config.every_steps, np.zeros(0, np.int64)
        if (step + 1) % every == 0 and self._config.choose == "failed":
            rows = np.array([*self._of_failed(flat)][: self._config.rows], np.int64)
        elif (step + 1) % every == 0:
            rows = rows_of(step // every, self._config.rows, len(self._demonstrations), self._seed)
        self._parts = iter(np.array_split(rows, len(minis)))
        self._sums = torch.zeros(2, dtype=torch.float64)
        return flat

    def _of_failed(self, flat: FlatBatch) -> Iterator[int]:
        """Rows with the prompt of a group without a reward above 0."""
        for group in np.unique(flat.group_ids):
            [members] = np.nonzero(flat.group_ids == group)
            row = self._by_prompt.get(prompt_of(flat, members[0]))
            if row is not None and (flat.rewards[members] <= 0).all():
                yield row

    def add_gradient(self, mini: MiniBatch) -> None:
        rows = next(self._parts)
        texts = text_batch([Text(*self._demonstrations[row], group_id=i) for i, row in enumerate(rows)])
        if texts is None:
            return
        ids = torch.from_numpy(texts.token_ids).to(self._packing.device)
        part = mini_batch(texts, np.arange(texts.sequences), self._packing, self._ranks, 1)
        for micro in part.micros():
            logprobs: Tensor = self._policy(micro, ids[micro.token_index])[0]
            self._policy.backward(-self._config.coef / part.totals.tokens * logprobs.sum())
            self._sums += torch.tensor([-float(logprobs.detach().sum()), len(logprobs)], dtype=torch.float64)

    def metrics(self) -> dict[str, float]:
        loss, tokens = self._ranks.sum_on_host(self._sums.clone()).tolist()
        return {"sft/loss": loss / tokens, "sft/tokens": tokens} if tokens else {}


def rows_of(turn: int, number: int, rows: int, seed: int) -> NDArray[np.int64]:
    """int64[number]: which of so many `rows` the `turn` (from 0) has, of turns of `number` each."""
    at = turn * number + np.arange(number)
    epochs = {epoch: np.random.default_rng([seed, epoch]).permutation(rows) for epoch in set(at // rows)}
    return np.array([epochs[epoch][i] for epoch, i in zip(at // rows, at % rows, strict=True)], np.int64)
