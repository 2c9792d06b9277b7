"""Advantages of turns: what one request of an episode has sampled is one action, however many tokens it has.

So a discount is by turns, whatever their lengths, and what a turn brought about later counts for all of its
tokens alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncrl.objective.advantages import Outcomes, grpo
from asyncrl.objective.gae import Steps, gae


@dataclass(frozen=True, slots=True)
class Turns:
    """The K turns of a batch; those of a member of a group are contiguous, in the order of its requests.

    rewards: float[K], what each has earned. members: int64[K], the index of each one's member. group_ids:
    int64[K]. numbers: int64[K], which request of its episode each was. lengths: int64[K], trained tokens.
    values: float[K], V of the state before each turn; None without a critic.
    """

    rewards: Tensor
    members: Tensor
    group_ids: Tensor
    numbers: Tensor
    lengths: Tensor
    values: Tensor | None = None

    def steps(self, values: Tensor) -> Steps:
        """Turns as the steps of `asyncrl.objective.gae`."""
        nothing = torch.zeros_like(self.rewards)
        return Steps(
            values, nothing, self.members, torch.ones_like(self.members, dtype=torch.bool), self.rewards
        )


def turn_gae(turns: Turns, *, gamma: float = 1.0, lam: float = 1.0) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over turns: (advantages, value targets), float[K] each.

        delta_k = R_k + gamma·V_{k+1} - V_k
        A_k = delta_k + gamma·lam·A_{k+1},   target_k = V_k + A_k

    V_k is the critic's value before the first token of turn k, R_k what the turn has earned. The target is
    that of every token of the turn: V_k cancels in it, and a discount by turns is the same from each of them.

    Source: Turn-PPO, Li et al. 2025 (arXiv 2512.17008); a critic of turns over a policy of tokens: ArCHer,
    Zhou et al. 2024 (arXiv 2402.19446).
    """
    assert turns.values is not None
    return gae(turns.steps(turns.values), gamma=gamma, lam=lam)


def turn_grpo(turns: Turns, *, gamma: float = 1.0, deviation: str = "population") -> Tensor:
    """Group-relative discounted returns of turns, float[K].

        G_k = R_k + gamma·G_{k+1}
        A_k = (G_k - mean) / standard deviation, of the returns G_k of all members of the group with a turn k

    R_k is what turn k has earned. So turn k is compared with the others' turn k, by what followed from it and
    not by what came before. A turn that no other member has is exactly 0. `deviation` as in `grpo`, which
    this is for members of one turn.

    Source: normalised discounted returns of turns: GTPO, Ding et al. 2025 (arXiv 2511.14846); turn by turn
    within the group: MT-GRPO, Zeng et al. 2025 (arXiv 2505.11821), which normalises what a turn and what the
    outcome has earned apart, and adds them.
    """
    returns, _ = gae(turns.steps(torch.zeros_like(turns.rewards)), gamma=gamma)
    _, same = torch.unique(torch.stack([turns.group_ids, turns.numbers]), dim=1, return_inverse=True)
    return grpo(Outcomes(returns, same, turns.lengths), deviation=deviation)
