"""Advantages of trajectories, from their rewards and those of the others.

Each is a function of `Outcomes` that returns float[S] of the rewards' dtype. All are computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asyncrl.objective.catalogue import PASS_K

CONSTANT_STD = 1e-6
"""A group whose standard deviation is at most this, relative to max(1, largest |reward|), is constant: what
is left is float noise, and dividing by it would make huge advantages out of nothing."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What is known of the S trajectories of a batch.

    rewards: float[S]. group_ids: int[S], which group each belongs to, in any order and any group sizes.
    lengths: int[S], trained tokens of each. log_ratios: float[S], log pi_prox - log mu of each, summed over
    its tokens; None where nothing asks for it. baselines: float[S], what a greedy response to the same prompt
    has earned; None where none was sampled. sampled_lengths: int[S], tokens of each, those that are masked
    included; None where these are `lengths`.

    Raises `ValueError` for other shapes, and for rewards that are not finite.
    """

    rewards: Tensor
    group_ids: Tensor
    lengths: Tensor
    log_ratios: Tensor | None = None
    baselines: Tensor | None = None
    sampled_lengths: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.rewards, self.group_ids, self.lengths)]
        if len(set(shapes)) > 1 or self.rewards.ndim != 1:
            raise ValueError(f"expected rewards[S], group_ids[S] and lengths[S], got {shapes}")
        self.refuse(~torch.isfinite(self.rewards), "only finite rewards can be compared")

    def refuse(self, bad: Tensor, why: str) -> None:
        """Raise `ValueError` that names the first trajectory where `bad` (bool[S])."""
        if bad.any():
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"the reward of trajectory {i} (group {int(self.group_ids[i])}) is {float(self.rewards[i])}; "
                f"{why}"
            )


def grpo(outcomes: Outcomes, *, deviation: str = "population") -> Tensor:
    """Group-relative advantages.

        A_i = (r_i - mean of i's group) / standard deviation of i's group

    Constant groups (groups of one included) are exactly 0. `deviation: population` divides the squares by the
    group's size n, so that no |A_i| exceeds sqrt(n - 1); `sample` by n - 1, as most implementations do, which
    makes every |A_i| smaller by sqrt(1 - 1/n).

    Source: GRPO, Shao et al. 2024 (arXiv 2402.03300).
    """
    groups = _Groups(outcomes)
    std = _deviation(groups.std, groups.sizes, deviation)
    return groups.unless_constant(groups.centred / std.clamp(min=CONSTANT_STD))


def lite_ppo(outcomes: Outcomes, *, deviation: str = "population") -> Tensor:
    """Group-relative advantages over the deviation of the whole batch, so that nearly equal rewards are not
    blown up.

        A_i = (r_i - mean of i's group) / standard deviation of all rewards

    `deviation` as in `grpo`. Lite PPO is this with `policy_loss: ppo` and `aggregation: token_mean`.

    Source: Liu et al. 2025, "Tricks or traps?" (arXiv 2508.08221).
    """
    groups, rewards = _Groups(outcomes), outcomes.rewards.double()
    unit = rewards.abs().max().clamp(min=1.0) if len(rewards) else 1.0
    std = _deviation((rewards / unit).std(correction=0), torch.tensor(len(rewards)), deviation)
    return groups.unless_constant(groups.centred * (groups.unit / unit) / std.clamp(min=CONSTANT_STD))


def dr_grpo(outcomes: Outcomes) -> Tensor:
    """Group-relative advantages, not divided by the deviation, so that easy and hard prompts weigh the same.

        A_i = r_i - mean of i's group

    Dr. GRPO also divides by no response's length: `objective.aggregation: constant_length`.

    Source: Liu et al. 2025 (arXiv 2503.20783).
    """
    groups = _Groups(outcomes)
    return groups.unless_constant(groups.centred * groups.unit)


def rloo(outcomes: Outcomes) -> Tensor:
    """Leave one out: the baseline of a response is the mean of the others, and so does not depend on it.

        A_i = r_i - mean of the others of i's group = n / (n - 1) · (r_i - mean of i's group)

    A group of one has no baseline, and the advantage 0.

    Source: Kool et al. 2019; for language models, Ahmadian et al. 2024 (arXiv 2402.14740).
    """
    groups = _Groups(outcomes)
    return groups.unless_constant(groups.less_others(groups.relative) * groups.unit)


def remax(outcomes: Outcomes) -> Tensor:
    """The baseline is what the policy earns on the prompt when it takes the likeliest token every time.

        A_i = r_i - r of a greedy response to i's prompt

    It depends on no sampled response. That response is not trained on.

    Source: ReMax, Li et al. 2024 (arXiv 2310.10505).
    """
    assert outcomes.baselines is not None
    return outcomes.rewards - outcomes.baselines


def opo(outcomes: Outcomes) -> Tensor:
    """The baseline of least variance when a response's gradient grows with its length l.

        A_i = r_i - sum of l_j·r_j / sum of l_j over i's group

    Source: OPO, Hao et al. 2025 (arXiv 2505.23585).
    """
    return opob(replace(outcomes, log_ratios=torch.zeros_like(outcomes.rewards)))


def opob(outcomes: Outcomes) -> Tensor:
    """`opo` off policy: the baseline of least variance when a response's gradient grows with its length l and
    is weighted by its ratio R = pi_prox / mu.

        A_i = r_i - sum of l_j·R_j²·r_j / sum of l_j·R_j² over i's group

    Source: VCPO, Huang et al. 2026 (arXiv 2602.17616), whose weight is the squared norm of the response's own
    gradient in the place of l; its norm would cost a backward pass for each response.
    """
    groups = _Groups(outcomes)
    assert outcomes.log_ratios is not None
    weight = groups.relative_to_largest(2 * outcomes.log_ratios.double() + outcomes.lengths.double().log())
    shift = groups.sum(weight * groups.centred) / groups.sum(weight).clamp(min=CONSTANT_STD)
    return groups.unless_constant((groups.centred - shift) * groups.unit)


def pass_at_k(outcomes: Outcomes, *, pass_k: int = PASS_K, success_above: float = 0.5) -> Tensor:
    """Advantages of the reward pass@k, that of the best of k responses, averaged over all subsets of k of a
    group of n responses, m of which failed.

        p = 1 - C(m, k) / C(n, k),   s = sqrt(p·(1 - p))
        A_i = (1 - p) / s where r_i > success_above, (1 - p - C(m - 1, k - 1) / C(n - 1, k - 1)) / s elsewhere

    With k = 1 these are `grpo`'s. Groups in which no subset failed, or every one, are exactly 0: what already
    succeeds once in k is not pushed further. A group smaller than k is taken as one subset.

    Source: Chen et al. 2025, "Pass@k training" (arXiv 2508.10751).
    """
    success = (outcomes.rewards > success_above).double()
    groups = _Groups(outcomes)
    size, failed = groups.sizes.double(), groups.sum(1 - success)
    k = size.clamp(max=pass_k)
    rate = 1 - _choose_share(failed, size, k)
    spread = (rate * (1 - rate)).sqrt()
    of_failed = 1 - rate - _choose_share(failed - 1, size - 1, k - 1)
    advantages = torch.where(success > 0, 1 - rate, of_failed) / spread.clamp(min=CONSTANT_STD)
    return torch.where(spread > CONSTANT_STD, advantages, 0.0).to(outcomes.rewards.dtype)


def canon(outcomes: Outcomes, *, inter_share: float = 1.0) -> Tensor:
    """Conditional advantages: the shorter half of a group is compared with the longer one and the longer with
    the shorter, so that whichever of the two does better is reinforced.

        A_i = inter_share·(r_i - mean of the other half) + (1 - inter_share)·(r_i - mean of i's own half)

    The shorter half are the n // 2 shortest of n responses, masked tokens included; where it ends, those of
    equal length belong to both halves in equal shares. With inter_share = 1/2 and equal halves this is
    `dr_grpo`.

    Source: CANON, Chen et al. 2025 (arXiv 2509.23962), of its metrics that of length.
    """
    groups = _Groups(outcomes)
    lengths = outcomes.lengths if outcomes.sampled_lengths is None else outcomes.sampled_lengths
    short = groups.least_half(lengths)
    means = [groups.sum(h * groups.centred) / groups.sum(h).clamp(min=1) for h in (short, 1 - short)]
    own = short * means[0] + (1 - short) * means[1]
    baseline = own + inter_share * (means[0] + means[1] - 2 * own)
    return groups.unless_constant((groups.centred - baseline) * groups.unit)


def pacs(outcomes: Outcomes, *, score_scale: float = 1.0, success_above: float = 0.5) -> Tensor:
    """Success as a label that the policy predicts: its score is how much likelier than the others of its
    group it has become, and what it is taught is the error of that prediction.

        s_i = score_scale·(log R_i - mean of the others' log R),   R = pi_prox / mu of the response
        e_i = (1 where r_i > success_above, 0 elsewhere) - sigmoid(s_i)
        A_i = score_scale·(e_i - mean of the others' e)

    These are the gradient of the cross-entropy of success and sigmoid(s) by the responses' log-probabilities,
    at the start of the step. On policy s is 0, and they are `rloo`'s of the successes, times score_scale.

    Source: PACS, Li et al. 2025 (arXiv 2509.02522).
    """
    groups = _Groups(outcomes)
    assert outcomes.log_ratios is not None
    success = (outcomes.rewards > success_above).double()
    log_ratios = outcomes.log_ratios.double().clamp(min=-1e6)  # of a token that has become impossible
    error = success - (score_scale * groups.less_others(log_ratios)).sigmoid()
    return (score_scale * groups.less_others(error)).to(outcomes.rewards.dtype)


def max_rl(outcomes: Outcomes) -> Tensor:
    """Maximum likelihood RL: the gradient of the log of the success rate, to the order that the group allows.

        A_i = (r_i - mean of i's group) / mean of i's group

    That order is n - 1 for n responses. Hard prompts weigh more. For rewards in {0, 1}; others must at least
    not be negative (`ValueError`).

    Source: Tajwar et al. 2026 (arXiv 2602.02710).
    """
    outcomes.refuse(
        outcomes.rewards < 0, "max_rl divides by the mean reward, and needs rewards of at least 0"
    )
    groups = _Groups(outcomes)
    mean = groups.mean(groups.relative)
    return groups.unless_constant(groups.centred / torch.where(mean > 0, mean, 1.0))


def ngrpo(outcomes: Outcomes, *, max_reward: float = 1.0, deviation: str = "population") -> Tensor:
    """GRPO with a virtual response of the greatest reward in each group, so that groups in which all failed
    push away from what was tried.

        A_i = (r_i - mean) / standard deviation, both of i's group and one more reward of `max_reward`

    Groups in which every reward is `max_reward` are exactly 0. `deviation` as in `grpo`. Raises `ValueError`
    for a greater reward.

    Source: NGRPO, Nan et al. 2025 (arXiv 2509.18851).
    """
    outcomes.refuse(outcomes.rewards > max_reward, f"ngrpo was told that max_reward={max_reward}")
    rewards, ids, of_each = outcomes.rewards, outcomes.group_ids, torch.unique(outcomes.group_ids)
    virtual = rewards.new_full(of_each.shape, max_reward)
    lengths = torch.cat([outcomes.lengths, torch.ones_like(of_each)])
    with_virtual = Outcomes(torch.cat([rewards, virtual]), torch.cat([ids, of_each]), lengths)
    return grpo(with_virtual, deviation=deviation)[: len(rewards)]


def nsr(outcomes: Outcomes, *, success_above: float = 0.5, positive_weight: float = 0.1) -> Tensor:
    """Negative sample reinforcement: failures are pushed down, successes only a little up.

        A_i = positive_weight where r_i > success_above, -1 elsewhere

    With `positive_weight` 0, failures only (NSR); in the paper 0.1 (weighted REINFORCE) keeps most diversity.
    Compares with no other response, so it works with groups of one.

    Source: Zhu et al. 2025 (arXiv 2506.01347).
    """
    success = outcomes.rewards > success_above
    return torch.where(success, outcomes.rewards.new_tensor(positive_weight), -1.0)


def psr(outcomes: Outcomes, *, success_above: float = 0.5) -> Tensor:
    """Positive sample reinforcement: `nsr`'s other half, successes only.

        A_i = 1 where r_i > success_above, 0 elsewhere

    Source: Zhu et al. 2025 (arXiv 2506.01347).
    """
    return (outcomes.rewards > success_above).to(outcomes.rewards.dtype)


def reinforce_pp(outcomes: Outcomes) -> Tensor:
    """REINFORCE++: rewards whitened over the whole batch, as if it were one group.

        A_i = (r_i - mean) / standard deviation, over the batch's tokens (each has its trajectory's reward)

    Works with groups of one. A constant batch is exactly 0.

    Source: Hu et al. 2025 (arXiv 2501.03262).
    """
    return _whitened(outcomes.rewards.double(), outcomes.lengths).to(outcomes.rewards.dtype)


def reinforce_pp_baseline(outcomes: Outcomes) -> Tensor:
    """REINFORCE++ with a baseline: the group's mean is taken off first, then the batch is whitened.

        d_i = r_i - mean of i's group
        A_i = (d_i - mean of d) / standard deviation of d, over the batch's tokens

    Source: Hu et al. 2025 (arXiv 2501.03262).
    """
    return _whitened(dr_grpo(outcomes).double(), outcomes.lengths).to(outcomes.rewards.dtype)


class _Groups:
    """Sums and means over groups, for each of the S trajectories.

    Rewards are taken relative to `unit`: max(1, largest |reward| of the group), so that no square overflows
    and what counts as constant does not depend on the scale.
    """

    def __init__(self, outcomes: Outcomes) -> None:
        self._dtype = outcomes.rewards.dtype
        rewards = outcomes.rewards.double()
        _, self._index, counts = torch.unique(outcomes.group_ids, return_inverse=True, return_counts=True)
        self._zeros = torch.zeros(len(counts), dtype=torch.float64, device=rewards.device)
        largest = self._zeros.scatter_reduce(0, self._index, rewards.abs(), "amax")
        self.sizes: Tensor = counts[self._index]
        self.unit = largest.clamp(min=1.0)[self._index]
        self.relative = rewards / self.unit
        self.centred = self.relative - self.mean(self.relative)
        self.std = self.mean(self.centred.square()).sqrt()

    def sum(self, values: Tensor) -> Tensor:
        return self._zeros.index_add(0, self._index, values)[self._index]

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.sizes

    def less_others(self, values: Tensor) -> Tensor:
        """values less the mean of the others' of the group; 0 in a group of one."""
        return (values - self.mean(values)) * self.sizes / (self.sizes - 1).clamp(min=1)

    def least_half(self, values: Tensor) -> Tensor:
        """float64[S]: the share with which each belongs to its group's lesser half by `values` (int[S], of at
        least 0); equal ones share alike."""
        keys = self._index * (values.max() + 1) + values
        _, at, same = torch.unique(keys, return_inverse=True, return_counts=True)
        counts = torch.bincount(self._index)
        less = (same.cumsum(0) - same)[at] - (counts.cumsum(0) - counts)[self._index]
        share: Tensor = (self.sizes // 2 - less).double() / same[at]
        return share.clamp(0, 1)

    def relative_to_largest(self, log_values: Tensor) -> Tensor:
        """exp(log_values), over the group's largest, so that none overflows."""
        largest = torch.full_like(self._zeros, -torch.inf).scatter_reduce(0, self._index, log_values, "amax")
        return (log_values - largest.clamp(min=-1e300)[self._index]).exp()

    def unless_constant(self, advantages: Tensor) -> Tensor:
        """The advantages, exactly 0 in constant groups."""
        return torch.where(self.std > CONSTANT_STD, advantages, 0.0).to(self._dtype)


def _deviation(population: Tensor, count: Tensor, deviation: str) -> Tensor:
    """The deviation of `count` numbers as a `population` or a `sample`, from the former."""
    if deviation == "population":
        return population
    return population * (count.double() / (count - 1).clamp(min=1)).sqrt()


def _choose_share(some: Tensor, of: Tensor, k: Tensor) -> Tensor:
    """C(some, k) / C(of, k) of float64: the share of the subsets of k that are wholly among `some`."""
    some = some.clamp(min=0)
    rest = (some - k).clamp(min=0)
    log_share = (some + 1).lgamma() - (rest + 1).lgamma() + (of - k + 1).lgamma() - (of + 1).lgamma()
    return torch.where(some >= k, log_share.exp(), 0.0)


def _whitened(values: Tensor, weights: Tensor) -> Tensor:
    """values (float64[S]) with weighted mean 0 and deviation 1; exactly 0 when they are constant."""
    if not len(values):
        return values
    unit = values.abs().max().clamp(min=1.0)
    share = weights.double() / weights.double().sum().clamp(min=1)
    relative = values / unit
    centred: Tensor = relative - (share * relative).sum()
    std = (share * centred.square()).sum().sqrt()
    return torch.where(std > CONSTANT_STD, centred / std.clamp(min=CONSTANT_STD), 0.0)
